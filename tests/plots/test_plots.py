"""Figures: exact numbers, no overlapping text with few or many layers, the same bytes each time."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.plots.histogram import merge_bins
from ddqcli.plots.overview import PER_SHEET
from ddqcli.plots.style import INK, PAPER, settings

KINDS = ("conv", "depthwise", "linear", "embedding")
WORDS = ("Gaussian-like", "heavy-tailed", "multi-peaked", "flat", "constant", "too few")


def layer(k: int = 0, name: str | None = None) -> plots.Layer:
    counts, edges = np.histogram(np.random.default_rng(k).standard_t(3, 3000), 128)
    return plots.Layer(
        name or f"features.denseblock{k // 24 + 1}.denselayer{k % 24 + 1}.conv{k % 2 + 1}.weight",
        KINDS[k % 4],
        WORDS[k % 6],
        float(edges[0]),
        float(edges[-1]),
        counts.tolist(),
        np.linspace(-2, 2, 16).tolist(),
        "best 16 levels (4 bits)",
    )


def time_series(n: int, steps: int = 30) -> tuple[list[str], np.ndarray, np.ndarray]:
    bits = np.clip(8 - np.arange(steps)[:, None] * np.linspace(0.05, 0.2, n), 2, 8).round()
    return [layer(k).name for k in range(n)], np.arange(steps) * 20, bits


def make(kind: str, n: int) -> list[Figure]:
    names, steps, bits = time_series(n)
    errors = np.geomspace(0.3, 0.001, n)[:, None] * np.exp(-steps / 400)
    return {
        "layer": lambda: [plots.layer_figure(layer(k)) for k in range(min(n, 6))],
        "overview": lambda: plots.overview_figures([layer(k) for k in range(n)]),
        "channels": lambda: [
            plots.channels_figure(
                names[0], np.sort(np.random.default_rng(0).normal(size=(2 * n, 5)), axis=1)
            )
        ],
        "bits": lambda: [
            plots.bits_by_layer_figure(names, [KINDS[k % 3] for k in range(n)], bits[-1])
        ],
        "bits over time": lambda: [
            plots.bits_over_time_figure(steps, names, bits, bits.mean(1), 4.0)
        ],
        "DBPs over time": lambda: [
            plots.probabilities_over_time_figure(
                steps, names, np.where(bits > 7, np.nan, bits / 8), bits
            )
        ],
        "error": lambda: [
            plots.error_over_time_figure(steps, dict(zip(names, errors, strict=True)))
        ],
        "levels": lambda: [
            plots.levels_over_time_figure(
                names[0],
                steps,
                [np.linspace(-1, 1, 16 if s < 300 else 8) for s in steps],
                *_edges_and_counts(),
            )
        ],
        "learned": lambda: plots.overview_figures(
            [replace(layer(k), learned=True) for k in range(n)]
        ),
        "loss": lambda: [
            plots.loss_over_time_figure(
                steps,
                np.exp(-steps / 99) * n,
                100 - 50 / (steps + 1),
                [(s, n / (s + 1), 80) for s in steps[::4]],
                steps[-1],
            )
        ],
        "sweep": lambda: [
            plots.size_against_accuracy_figure(
                {
                    "learned": [(8e4, 86.0, "2 bits"), (1.5e5, 91.0, "4 bits")],
                    "uniform": [(8e4, 70.0, "2 bits")],
                },
                (1.1e6, 92.0),
            )
        ],
    }[kind]()


def _edges_and_counts() -> tuple[np.ndarray, np.ndarray]:
    counts, edges = np.histogram(np.random.default_rng(1).normal(size=500), 32)
    return edges, counts


FIGURES = (
    "layer",
    "overview",
    "learned",
    "channels",
    "bits",
    "bits over time",
    "error",
    "levels",
    "loss",
    "sweep",
)


def texts(figure: Figure) -> list[tuple[str, object]]:
    """Return all drawn texts with their bounding boxes in pixels."""
    with settings():
        figure.draw_without_rendering()
        drawn = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            bottom, top = sorted(axes.get_ylim())
            for tick in axes.xaxis.get_major_ticks():
                if low <= tick.get_loc() <= high and tick.label1.get_visible():
                    drawn.append(tick.label1)
            for tick in axes.yaxis.get_major_ticks():
                if bottom <= tick.get_loc() <= top and tick.label1.get_visible():
                    drawn.append(tick.label1)
            drawn += [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
        return [(t.get_text(), t.get_window_extent()) for t in drawn if t.get_text().strip()]


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("n", [1, 5, 45])
def test_no_text_overlaps_another_or_leaves_the_figure(kind, n):
    for figure in make(kind, n)[:2]:
        drawn, extents = zip(*texts(figure), strict=True)
        x0, y0, x1, y1 = np.array([box.extents for box in extents]).T
        width, height = figure.get_size_inches() * figure.dpi
        outside = (x0 < -1) | (y0 < -1) | (x1 > width + 1) | (y1 > height + 1)
        assert not outside.any(), [drawn[k] for k in np.flatnonzero(outside)]
        apart = (x1[:, None] <= x0 + 0.5) | (y1[:, None] <= y0 + 0.5)
        over = np.argwhere(np.triu(~(apart | apart.T), 1))
        assert len(over) == 0, [(drawn[a], drawn[b]) for a, b in over]
        assert len(drawn) > 3


@pytest.mark.parametrize("kind", FIGURES)
def test_files_are_valid_and_have_the_same_bytes_each_time(kind, tmp_path):
    first = plots.save(make(kind, 5)[0], tmp_path / "first")
    second = plots.save(make(kind, 5)[0], tmp_path / "second.1")
    assert [p.name for p in second] == ["second.1.png", "second.1.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = first[1].read_text(encoding="utf-8")
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<dc:date>" not in svg


def test_the_histogram_shows_all_weights_and_all_levels():
    drawn = layer(0)
    axes = plots.layer_figure(drawn).axes[0]
    filled = axes.patches[0]
    assert filled.get_data().values.sum() == sum(drawn.counts)
    assert filled.get_data().edges[[0, -1]].tolist() == [drawn.low, drawn.high]
    lines = [segment[0, 0] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(lines, drawn.levels)


def test_heavy_tails_are_drawn_on_a_log_axis():
    assert plots.layer_figure(layer(0)).axes[0].get_yscale() == "linear"
    assert plots.layer_figure(layer(1)).axes[0].get_yscale() == "log"


def test_fewer_weights_get_fewer_bins():
    for total in (1, 30, 1000, 10**6):
        counts = np.random.default_rng(0).multinomial(total, np.ones(128) / 128)
        merged = merge_bins(counts, 96)
        assert merged.sum() == total
        assert 128 % len(merged) == 0
        assert len(merged) <= min(96, max(16, 2.8 * total ** (1 / 3)))


def test_an_overview_has_one_panel_per_layer():
    for n in (1, 5, 45):
        sheets = [figure.axes[0] for figure in plots.overview_figures([layer(k) for k in range(n)])]
        assert sum(len(sheet.patches) for sheet in sheets) == n
        assert max(len(sheet.patches) for sheet in sheets) <= PER_SHEET[0] * PER_SHEET[1]


def test_a_panel_fits_the_weight_range_and_the_largest_count():
    low, drawn = 0.28 + 0.1, layer(0)  # panels of one sheet start at the bottom margin
    heights, edges, baseline = plots.overview_figures([drawn])[0].axes[0].patches[0].get_data()
    assert baseline == pytest.approx(low)
    assert heights.max() == pytest.approx(low + 0.68)
    counts = merge_bins(np.array(drawn.counts, float), 48)
    np.testing.assert_allclose((heights - baseline) / 0.68, counts / counts.max(), atol=1e-12)
    assert 0.15 < edges[0] < edges[-1] < 0.15 + 2.15 - 0.2


def test_overview_sheets_show_learned_levels_only():
    def lines(drawn: plots.Layer) -> list[int]:
        return [
            len(c.get_segments()) for c in plots.overview_figures([drawn])[0].axes[0].collections
        ]

    assert 16 not in lines(layer(0))
    assert 16 in lines(replace(layer(0), learned=True))
    assert 300 not in lines(
        replace(layer(0), learned=True, levels=range(300))
    )  # they would hide the histogram


def test_counts_at_levels_are_drawn_where_the_levels_are():
    drawn = plots.Layer(
        "a", "conv", "as stored", -1, 2, [3, 0, 5], [-1, 0.5, 2], "3 levels", True, True
    )
    bars = plots.layer_figure(drawn).axes[0].collections[0].get_segments()
    assert [bar.tolist() for bar in bars] == [
        [[-1, 0], [-1, 3]],
        [[0.5, 0], [0.5, 0]],
        [[2, 0], [2, 5]],
    ]


def test_the_loss_figure_shows_the_given_numbers():
    figure = plots.loss_over_time_figure([10, 20, 30], [1.0, 0.5, 0.25], [10, 50, 90])
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[10, 1.0], [20, 0.5], [30, 0.25]]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [10, 50, 90]


@pytest.mark.parametrize(
    ("delivered", "label"), [(30, "delivered: step 30"), (0, "delivered: start")]
)
def test_the_loss_figure_shows_looks_and_the_delivered_step(delivered: int, label: str):
    looks = [(0, 2.0, 5.0), (30, 0.5, 80.0)]
    figure = plots.loss_over_time_figure(
        [10, 20, 30], [1, 0.5, 0.2], [10, 50, 90], looks, delivered
    )
    for axes, values in zip(figure.axes, ([2, 0.5], [5, 80]), strict=True):
        assert axes.lines[1].get_xydata().tolist() == [[0, values[0]], [30, values[1]]]
        assert set(axes.lines[2].get_xdata()) == {delivered}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["training batches", "held-out samples", label]


def test_bars_have_the_height_of_the_bits_and_depthwise_bars_are_hatched():
    figure = plots.bits_by_layer_figure(["a", "b", "c"], ["conv", "depthwise", "conv"], [2, 8, 3.5])
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [2, 8, 3.5]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, False]
    assert bars[0].get_facecolor() != bars[1].get_facecolor()


def test_bits_over_time_are_drawn_as_given():
    names, steps, bits = time_series(7)
    figure = plots.bits_over_time_figure(steps, names, bits, bits.mean(1))
    np.testing.assert_array_equal(figure.axes[1].collections[0].get_array().reshape(7, 30), bits.T)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), bits.mean(1))
    assert figure.axes[0].get_ylim()[1] > 8


def test_dbps_over_time_are_drawn_as_given_with_the_bits_where_they_change():
    names, steps, bits = time_series(7)
    table = np.where(bits > 7, np.nan, bits / 8)
    axes = plots.probabilities_over_time_figure(steps, names, table, bits).axes[0]
    drawn = axes.collections[0].get_array().reshape(7, 30)
    np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), table.T)
    changes = sum(1 + int((np.diff(series) != 0).sum()) for series in bits.T)
    assert len(axes.texts) == changes


def test_the_axes_include_stored_bits_and_targets_above_eight():
    names, steps, bits = time_series(7)
    figure = plots.bits_over_time_figure(steps, names, bits, bits.mean(1) + 12)
    assert figure.axes[0].get_ylim()[1] > bits.mean(1).max() + 12
    assert (
        plots.bits_over_time_figure(steps, names, bits, bits.mean(1), 30).axes[0].get_ylim()[1] > 30
    )


def test_the_legend_names_the_largest_errors_and_counts_the_others():
    errors = {f"layer{k}": [0.1, 0.01 * (k + 1)] for k in range(9)}
    figure = plots.error_over_time_figure([0, 10], errors, named=3)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["layer8", "layer7", "layer6", "median of all layers", "the 6 other layers"]


def test_an_error_of_zero_can_be_drawn():
    figure = plots.error_over_time_figure([0, 1], {"a": [0.0, 0.0], "b": [0.1, 0.0]})
    assert b"<svg" in plots.svg_of(figure).encode()


def test_the_number_of_levels_may_change_over_time():
    figure = make("levels", 5)[0]
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(lines) == 16 + 8


def test_a_sweep_shows_every_point():
    figure = make("sweep", 1)[0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["2 bits", "4 bits", "2 bits"]
    points = {
        tuple(point) for line in figure.axes[0].lines for point in np.round(line.get_xydata(), 6)
    }
    assert {(80.0, 86.0), (150.0, 91.0), (80.0, 70.0), (1100.0, 92.0)} <= points


def test_a_constant_layer_and_odd_names_can_be_drawn(tmp_path):
    constant = plots.Layer(
        "a$b_{c}<&>\\frac.weight", "conv", "constant", 0.5, 0.5, [*[0] * 127, 9], [0.5] * 16, "best"
    )
    plots.save(plots.layer_figure(constant), tmp_path / "constant")
    assert "a$b_{c}&lt;&amp;&gt;\\frac" in (tmp_path / "constant.svg").read_text(encoding="utf-8")


def test_an_svg_element_takes_the_colors_of_the_page():
    svg = plots.svg_of(plots.layer_figure(layer(0)))
    element = plots.for_page(svg)
    assert INK in svg and PAPER in svg  # noqa: PT018
    assert element.startswith("<svg ")
    assert INK not in element
    assert PAPER not in element
    assert "currentColor" in element
    assert "http" not in element
    root = ET.fromstring(element.replace("xlink:href", "href"))
    used = {
        value.split("#")[1].rstrip(")")
        for e in root.iter()
        for value in e.attrib.values()
        if "#m" in value
    }
    assert used <= {e.attrib.get("id") for e in root.iter()}


def test_the_users_matplotlib_settings_have_no_effect():
    mine = plots.svg_of(plots.layer_figure(layer(0)))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert plots.svg_of(plots.layer_figure(layer(0))) == mine
        assert matplotlib.rcParams["font.size"] == 30


# ---- axes that end where values can, and names for screen readers


@pytest.mark.parametrize("values", [(99.44, 100.0), (100.0, 100.0), (0.0, 3.0), (0.0, 100.0)])
def test_no_axis_runs_to_a_share_that_cannot_be(values: tuple[float, float]):
    low, high = values
    looks = [(0, 0.4, low), (60, 0.2, high)]
    loss = plots.loss_over_time_figure([10, 60], [0.5, 0.1], values, looks, 60).axes
    sweep = plots.size_against_accuracy_figure({"a": [(1e4, low, "2"), (3e4, high, "8")]}).axes
    for axes in (loss[1], sweep[0]):
        bottom, top = axes.get_ylim()
        assert 0 <= bottom <= low <= high <= top <= 100
        assert bottom < top


def test_an_axis_of_another_unit_is_free():
    for label in ("PSNR, dB", "relative error"):
        figure = plots.loss_over_time_figure([10, 20], [1, 2], [110.0, 120.0], metric=label)
        assert figure.axes[1].get_ylim()[1] > 120


def test_a_negative_loss_is_in_sight():
    axes = plots.loss_over_time_figure([10, 20], [-3.0, -5.0], [50, 60]).axes[0]
    assert axes.get_ylim()[0] < -5


@pytest.mark.parametrize("kind", ["bits over time", "DBPs over time", "error", "levels", "loss"])
def test_a_step_axis_begins_at_0_and_ends_at_the_last_step(kind: str):
    figure = make(kind, 5)[0]
    stepped = [axes for axes in figure.axes if axes.get_xlabel() == "step"]
    assert stepped
    for axes in stepped:
        assert axes.get_xlim() == (0, 29 * 20)


def test_the_freeze_of_batch_norm_is_marked_and_named():
    figure = plots.loss_over_time_figure([10, 90], [1, 2], [5, 6], batch_norm_step=40)
    for axes in figure.axes:
        assert set(axes.lines[1].get_xdata()) == {40}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training batches", "BatchNorm frozen: step 40"]


def test_the_time_at_8_bits_without_levels_is_shaded_and_named():
    def labels(first: int) -> list[str]:
        levels = [[-1.0, 1.0]] * 2
        figure = plots.levels_over_time_figure("a", [first, 90], levels, [-1, 0, 1], [3, 4])
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert "8 bits: the full grid" in labels(30)
    assert "8 bits: the full grid" not in labels(0)


def test_a_ring_marks_this_run_of_a_sweep():
    points = [(1e4, 50.0, "2 bits"), (2e4, 60.0, "4 bits")]
    figure = plots.size_against_accuracy_figure({"a": points}, this="4 bits")
    (ring,) = [line for line in figure.axes[0].lines if line.get_label() == "this run"]
    assert ring.get_xydata().tolist() == [[20, 60]]


@pytest.mark.parametrize("kind", [*FIGURES, "DBPs over time"])
def test_every_svg_has_a_role_and_a_label(kind: str):
    svg = ET.fromstring(plots.svg_of(make(kind, 5)[0]))
    assert svg.get("role") == "img"
    assert svg.get("aria-label")


def test_a_label_is_data():
    name = 'a"><script>&\n\x1b.weight'
    figure = plots.layer_figure(replace(layer(0), name=name))
    label = ET.fromstring(plots.svg_of(figure)).get("aria-label")
    assert label.startswith('a"><script>&\\n\\x1b.weight: ')


@pytest.mark.parametrize("n", [19, 80, 161])
def test_the_labels_of_deep_networks_are_all_there_and_readable(n: int):
    names = [f"features.denseblock{k // 24}.denselayer{k}.conv1.weight" for k in range(n)]
    figure = plots.bits_by_layer_figure(names, ["conv"] * n, [4] * n)
    labels = [label for axes in figure.axes for label in axes.get_xticklabels()]
    assert len({label.get_text() for label in labels}) == n
    assert min(label.get_fontsize() for label in labels) >= 6
    assert figure.get_figwidth() > plots.WIDTH  # so a page shows it across, not shrunk
