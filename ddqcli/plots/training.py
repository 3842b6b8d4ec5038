"""Pictures of a finetuning: bits by layer (Fig. 3), bits over time (Fig. 4), error and levels over time (Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ddqcli.plots.style import (
    BLUE,
    CYCLE,
    GREY,
    INK,
    KIND_COLOURS,
    KIND_HATCHES,
    VERMILLION,
    new_figure,
    place,
    settings,
    shorten,
)

MAX_BITS = 8
BARS_A_ROW = 40


def bits_by_layer_figure(names: Sequence[str], kinds: Sequence[str], bits: Sequence[float]) -> Figure:
    """Bars of each layer's bits, coloured and hatched by kind, 40 layers to a row (Fig. 3)."""
    rows = max(1, -(-len(names) // BARS_A_ROW))
    across = -(-len(names) // rows)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 26) for name in names]
        below = 0.15 + 0.062 * max(map(len, labels), default=0)
        width, panel = max(4.4, 0.75 + 0.2 * across), 1.5 + below
        height = 0.75 + rows * panel
        figure = new_figure(width, height)
        for row in range(rows):
            part = slice(row * across, (row + 1) * across)
            axes = place(figure, 0.55, height - 0.6 - (row + 1) * panel + below + 0.1, width - 0.7, 1.3)
            _bars(axes, labels[part], kinds[part], bits[part], across)
        _title(figure, "Bits by layer")
        shown = [kind for kind in KIND_COLOURS if kind in kinds]
        patches = [Patch(fc=KIND_COLOURS[k], hatch=KIND_HATCHES.get(k, ""), ec="white", lw=0, label=k) for k in shown]
        figure.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, 1 - 0.3 / height), ncols=4, handlelength=1.8)
    return figure


def _bars(axes: Axes, labels: Sequence[str], kinds: Sequence[str], bits: Sequence[float], across: int) -> None:
    for x, (kind, height) in enumerate(zip(kinds, bits, strict=True)):
        axes.bar(x, height, 0.78, color=KIND_COLOURS.get(kind, GREY), hatch=KIND_HATCHES.get(kind), ec="white", lw=0)
        axes.text(x, height + 0.15, f"{height:.3g}", ha="center", va="bottom", fontsize=5.5)
    axes.set_xlim(-0.7, max(across, 1) - 0.3)
    axes.set_ylim(0, MAX_BITS + 1)
    axes.set_yticks(range(0, MAX_BITS + 1, 2))
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_ylabel("bits a weight")
    axes.grid(axis="y")


def bits_over_time_figure(
    steps: Sequence[int], names: Sequence[str], bits: np.ndarray, average: Sequence[float], target: float | None = None
) -> Figure:
    """Average bits as a line over a map of each layer's bits by step; `bits` [steps, layers] (Fig. 4)."""
    bits = np.asarray(bits, float)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 30) for name in names]
        left, line = 0.35 + 0.062 * max(map(len, labels), default=0), max(0.12, min(0.3, 2.4 / len(labels)))
        width, map_height = left + 5.0, line * len(labels)
        height = map_height + 2.75
        figure = new_figure(width, height)
        top = place(figure, left, height - 1.55, width - left - 0.9, 1.05)
        top.plot(steps, average, color=BLUE, lw=1.3, drawstyle="steps-post")
        if target is not None:
            top.axhline(target, color=VERMILLION, lw=1, ls="--")
            top.annotate(
                f"target {target:g}", (1.01, target), color=VERMILLION, fontsize=7, va="center",
                xycoords=top.get_yaxis_transform(), annotation_clip=False,
            )  # fmt: skip
        top.set_ylabel("average bits\na weight")
        top.set_ylim(0, MAX_BITS + 0.5)
        top.grid()
        axes = place(figure, left, 0.95, width - left - 0.9, map_height, sharex=top)
        colours = ListedColormap(colormaps["viridis"](np.linspace(0, 1, MAX_BITS)))
        mesh = axes.pcolormesh(
            _edges(steps), np.arange(len(names) + 1), bits.T, cmap=colours, norm=BoundaryNorm(np.arange(0.5, 9), 8),
            rasterized=True,
        )  # fmt: skip
        axes.set_ylim(len(names), 0)
        axes.set_yticks(np.arange(len(names)) + 0.5, labels, fontsize=6)
        axes.tick_params(axis="y", length=0)
        for row, last in enumerate(bits[-1]):
            axes.text(1.01, row + 0.5, f"{last:.3g}", fontsize=6, va="center", transform=axes.get_yaxis_transform())
        axes.set_xlabel("step")
        bar = figure.colorbar(mesh, cax=place(figure, left, 0.3, 2.6, 0.1), orientation="horizontal", ticks=range(1, 9))
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        figure.text((left + 2.7) / width, 0.35 / height, "bits of a layer; its last ones stand at the right", va="center")
        _title(figure, "Bits over time")
    return figure


def error_over_time_figure(steps: Sequence[int], errors: Mapping[str, Sequence[float]], named: int = 5) -> Figure:
    """Relative quantization error by layer; the largest at the end by name, the median, the others grey (Fig. 5a)."""
    with settings():
        figure = new_figure(6.4, 4.1)
        table = np.array([np.asarray(series, float) for series in errors.values()])
        table = np.where(table > 0, table, np.nan)  # no error at all has no place on a log axis
        largest = np.argsort(-np.nan_to_num(table[:, -1]), kind="stable")[:named]
        legend = [shorten(list(errors)[k].removesuffix(".weight"), 34) for k in largest]
        rows = -(-(len(legend) + 2) // 2)
        floor = 0.6 + 0.16 * rows
        axes = place(figure, 0.75, floor + 0.15, 5.45, 3.4 - floor)
        for k, series in enumerate(table):
            if k not in largest:
                axes.plot(steps, series, color=GREY, lw=0.6, alpha=0.6)
        styles = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))
        for position, k in enumerate(largest):
            style = {"color": CYCLE[position % len(CYCLE)], "ls": styles[position % len(styles)], "lw": 1.3}
            axes.plot(steps, table[k], label=legend[position], **style)
        axes.plot(steps, np.nanmedian(table, axis=0), color=INK, lw=1.8, label="median of all layers")
        if len(table) > len(largest):
            axes.plot([], [], color=GREY, lw=0.6, label=f"the {len(table) - len(largest)} other layers")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("relative error |q - w|² / |w|² (log)")
        axes.grid()
        figure.legend(loc="lower left", bbox_to_anchor=(0, 0), ncols=2, handlelength=3)
        _title(figure, "Quantization error over time")
    return figure


def levels_over_time_figure(
    name: str, steps: Sequence[int], levels: Sequence[Sequence[float]], edges: np.ndarray, counts: np.ndarray
) -> Figure:
    """One layer's levels by step beside the histogram of its weights (Fig. 5b). Their number may change on the way."""
    with settings():
        figure = new_figure(6.4, 3.6)
        axes = place(figure, 0.75, 0.55, 4.1, 2.45)
        firsts = [0, *(k for k in range(1, len(levels)) if len(levels[k]) != len(levels[k - 1])), len(levels)]
        for first, end in zip(firsts, firsts[1:], strict=False):
            part = np.array(levels[first:end], float)
            for k, series in enumerate(part.T):
                colour = colormaps["viridis"](0.9 * k / max(part.shape[1] - 1, 1))
                axes.plot(steps[first:end], series, color=colour, lw=1.1 if part.shape[1] <= 16 else 0.6,
                          marker="." if end - first == 1 else None, ms=3)  # fmt: skip
            if first:
                axes.axvline(steps[first], color=GREY, lw=0.7, ls=":")
        axes.set_xlabel("step")
        axes.set_ylabel("level")
        axes.grid()
        beside = place(figure, 4.95, 0.55, 1.25, 2.45, sharey=axes)
        beside.stairs(counts, edges, orientation="horizontal", fill=True, color=BLUE, alpha=0.45, lw=0)
        beside.hlines(levels[-1], 0, 1, transform=beside.get_yaxis_transform(), color=VERMILLION, lw=0.7, alpha=0.7)
        beside.tick_params(labelleft=False, left=False)
        beside.xaxis.set_major_locator(MaxNLocator(2))
        beside.set_xlim(0)
        beside.set_xlabel("weights per bin")
        beside.set_title("last levels", fontsize=7, color=VERMILLION)
        _title(figure, f"Levels over time: {shorten(name, 56)}")
    return figure


def size_against_accuracy_figure(
    series: Mapping[str, Sequence[tuple[float, float, str]]], stored: tuple[float, float] | None = None
) -> Figure:
    """Accuracy (a share) over file size (bytes) of a sweep: series of (bytes, accuracy, label); `stored` is the float model."""
    with settings():
        figure = new_figure(6.4, 4.0)
        axes = place(figure, 0.75, 0.95, 5.3, 2.55)
        everything = [point[0] for points in series.values() for point in points] + ([stored[0]] if stored else [])
        factor, unit = (1e6, "MB") if max(everything) >= 1e6 else (1e3, "kB")
        for k, (label, points) in enumerate(series.items()):
            ordered = sorted(points)
            x, y = [p[0] / factor for p in ordered], [100 * p[1] for p in ordered]
            axes.plot(x, y, color=CYCLE[k % len(CYCLE)], marker="osD^vP"[k % 6], ms=5, lw=1.2, label=label)
            for (size, accuracy, text), below in zip(ordered, [k % 2 == 1] * len(ordered), strict=True):
                axes.annotate(
                    text, (size / factor, 100 * accuracy), (0, -9 if below else 6), textcoords="offset points",
                    ha="center", va="top" if below else "bottom", fontsize=6.5, color=CYCLE[k % len(CYCLE)],
                )  # fmt: skip
        if stored:
            axes.axhline(100 * stored[1], color=GREY, lw=1, ls="--")
            axes.plot(stored[0] / factor, 100 * stored[1], "*", color=INK, ms=9, ls="none", label="float model")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=6.5)
        axes.margins(0.08, 0.18)
        axes.set_xlabel(f"size of the file, {unit} (log)")
        axes.set_ylabel("accuracy, %")
        axes.grid(which="both")
        figure.legend(loc="lower left", bbox_to_anchor=(0, 0), ncols=4)
        _title(figure, "Size against accuracy")
    return figure


def _title(figure: Figure, text: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.2 / height, text, fontsize=11, fontweight="bold", va="center")


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Step boundaries for a map: each column reaches to the next step, the last as far as the one before."""
    steps_ = np.asarray(steps, float)
    last = steps_[-1] - steps_[-2] if len(steps_) > 1 else 1.0
    return np.append(steps_, steps_[-1] + last)
