"""Bits by layer (Fig. 3) and bits over time (Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from ddqcli.formatting import shorten
from ddqcli.plots.layout import add_axes, add_legend, add_text, add_title, new_figure
from ddqcli.plots.style import BLUE, GRAY, INK, KIND_COLORS, KIND_HATCHES, VERMILLION, settings

MAX_BITS = 8
BARS_PER_ROW = 40


def bits_by_layer_figure(
    names: Sequence[str], kinds: Sequence[str], bits: Sequence[float]
) -> Figure:
    """Draw each layer's bits as a bar colored and hatched by kind, 40 layers per row (Fig. 3)."""
    rows = max(1, -(-len(names) // BARS_PER_ROW))
    columns = -(-len(names) // rows)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 32 if rows == 1 else 24) for name in names]
        label_height = 0.15 + 0.05 * max(map(len, labels), default=0)
        width, row_height = max(4.4, 0.75 + 0.2 * columns), 1.55 + label_height
        height = 0.5 + rows * row_height
        figure = new_figure(width, height)
        for row in range(rows):
            part = slice(row * columns, (row + 1) * columns)
            bottom = height - 0.5 - (row + 1) * row_height + label_height
            axes = add_axes(figure, 0.55, bottom, width - 0.7, 1.35)
            _draw_bars(axes, labels[part], kinds[part], bits[part], columns)
        add_title(figure, "Bits by layer")
        patches = [
            Patch(fc=color, hatch=KIND_HATCHES.get(kind), ec="white", lw=0, label=kind)
            for kind, color in KIND_COLORS.items()
            if kind in kinds
        ]
        add_legend(figure, 1 - 0.28 / height, loc="upper left", handles=patches)
    return figure


def _draw_bars(
    axes: Axes, labels: Sequence[str], kinds: Sequence[str], bits: Sequence[float], columns: int
) -> None:
    for x, (kind, height) in enumerate(zip(kinds, bits, strict=True)):
        color, hatch = KIND_COLORS.get(kind, GRAY), KIND_HATCHES.get(kind)
        axes.bar(x, height, 0.78, color=color, hatch=hatch, ec="white", lw=0)
        axes.text(x, height + 0.15, f"{height:.3g}", ha="center", va="bottom", fontsize=5.5)
    axes.set_xlim(-0.7, max(columns, 5) - 0.3)
    axes.set_ylim(0, MAX_BITS + 1)
    axes.set_yticks(range(0, MAX_BITS + 1, 2))
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_ylabel("bits")
    axes.grid(axis="y")


def bits_over_time_figure(
    steps: Sequence[float],
    names: Sequence[str],
    bits: ArrayLike,
    average: Sequence[float],
    target: float | None = None,
) -> Figure:
    """Draw the average bits as a line above a map of each layer's bits by step (Fig. 4).

    `bits` [steps, layers] are the bits of each index; `average` and `target` are stored bits per
    weight, which include levels, scales and gates.
    """
    table = np.asarray(bits, float)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 30) for name in names]
        left = max(0.65, 0.25 + 0.052 * max(map(len, labels), default=0))
        row_height = max(0.12, min(0.3, 2.4 / len(labels)))
        width, map_height = left + 5.0, row_height * len(labels)
        height = map_height + 2.6
        figure = new_figure(width, height)
        top = add_axes(figure, left, height - 1.45, width - left - 0.9, 1.05)
        _draw_average(top, steps, average, target)
        axes = add_axes(figure, left, 0.95, width - left - 0.9, map_height, sharex=top)
        mesh = _draw_map(axes, steps, labels, table)
        color_axes = add_axes(figure, left, 0.3, 2.6, 0.1)
        bar = figure.colorbar(mesh, cax=color_axes, orientation="horizontal", ticks=range(1, 9))
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        add_text(figure, left + 2.75, 0.35, "bits of a layer")
        add_text(figure, width - 0.84, 0.95 + map_height + 0.08, "last", size=6)
        add_title(figure, "Bits over time")
    return figure


def probabilities_over_time_figure(
    steps: Sequence[float], names: Sequence[str], probabilities: ArrayLike, bits: ArrayLike
) -> Figure:
    """Draw a map of each layer's DBP by step: the probability of the larger bit-width (SDQ).

    Both arrays are [steps, layers]; the probability is NaN for a layer that is not sampled. `bits`,
    the more probable bit-width, is written where it changes.
    """
    table, in_force = np.asarray(probabilities, float), np.asarray(bits, float)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 30) for name in names]
        left = max(0.65, 0.25 + 0.052 * max(map(len, labels), default=0))
        row_height = max(0.12, min(0.3, 2.4 / len(labels)))
        width, map_height = left + 5.0, row_height * len(labels)
        figure = new_figure(width, map_height + 1.35)
        axes = add_axes(figure, left, 0.95, width - left - 0.9, map_height)
        mesh = axes.pcolormesh(
            _column_edges(steps),
            np.arange(len(labels) + 1),
            np.ma.masked_invalid(table.T),
            cmap="viridis",
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        axes.set_ylim(len(labels), 0)
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("step")
        for row, series in enumerate(in_force.T):
            for column in [0, *(np.flatnonzero(np.diff(series)) + 1)]:
                label = f" {series[column]:.3g}"
                color = INK if table[column, row] > 0.6 else "white"  # bright cells, dark ones
                axes.text(steps[column], row + 0.5, label, fontsize=6, va="center", color=color)
        color_axes = add_axes(figure, left, 0.3, 2.6, 0.1)
        bar = figure.colorbar(mesh, cax=color_axes, orientation="horizontal")
        bar.outline.set_visible(False)
        add_text(figure, left + 2.75, 0.35, "probability of the larger bit-width")
        add_title(figure, "DBPs over time")
    return figure


def _draw_average(
    axes: Axes, steps: Sequence[float], average: Sequence[float], target: float | None
) -> None:
    axes.plot(steps, average, color=BLUE, lw=1.3, drawstyle="steps-post")
    if target is not None:
        axes.axhline(target, color=VERMILLION, lw=1, ls="--")
        axes.annotate(
            f"target {target:g}",
            (1.01, target),
            color=VERMILLION,
            fontsize=7,
            va="center",
            xycoords=axes.get_yaxis_transform(),
            annotation_clip=False,
        )
    axes.set_ylabel("stored bits\na weight")
    # With their levels, small tensors can store more than 8 bits per weight.
    axes.set_ylim(0, max([MAX_BITS, target or 0, *average]) + 0.5)
    axes.grid()
    axes.tick_params(labelbottom=False)


def _draw_map(
    axes: Axes, steps: Sequence[float], labels: Sequence[str], bits: NDArray[np.float64]
) -> ScalarMappable:
    """Draw one row per layer and one column per step, with the last bits at the right."""
    colors = ListedColormap(colormaps["viridis"](np.linspace(0, 1, MAX_BITS)))
    mesh = axes.pcolormesh(
        _column_edges(steps),
        np.arange(len(labels) + 1),
        bits.T,
        cmap=colors,
        norm=BoundaryNorm(np.arange(0.5, MAX_BITS + 1), MAX_BITS),
        rasterized=True,
    )
    axes.set_ylim(len(labels), 0)
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=6)
    axes.tick_params(axis="y", length=0)
    right = axes.get_yaxis_transform()
    for row, last in enumerate(bits[-1]):
        axes.text(1.01, row + 0.5, f"{last:.3g}", fontsize=6, va="center", transform=right)
    axes.set_xlabel("step")
    return mesh


def _column_edges(steps: Sequence[float]) -> NDArray[np.float64]:
    """Return the edges between columns; the last column is as wide as its neighbor."""
    edges = np.asarray(steps, float)
    width = edges[-1] - edges[-2] if len(edges) > 1 else 1.0
    return np.append(edges, edges[-1] + width)
