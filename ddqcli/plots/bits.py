"""Bits by layer (Fig. 3) and bits over time (Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from ddqcli.formatting import shorten
from ddqcli.plots.layout import (
    WIDE,
    WIDTH,
    add_axes,
    add_legend,
    add_text,
    add_title,
    new_figure,
)
from ddqcli.plots.style import BLUE, GRAY, INK, KIND_COLORS, KIND_HATCHES, VERMILLION, settings

MAX_BITS = 8
FEW_BARS, BARS_PER_ROW = 18, 60  # in a figure of WIDTH, in a row of a WIDE one


def bits_by_layer_figure(
    names: Sequence[str], kinds: Sequence[str], bits: Sequence[float]
) -> Figure:
    """Draw each layer's bits as a bar colored and hatched by kind, 60 layers per row (Fig. 3)."""
    rows = max(1, -(-len(names) // BARS_PER_ROW))
    columns = -(-len(names) // rows)
    width = WIDTH if columns <= FEW_BARS else WIDE
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 32 if rows == 1 else 24) for name in names]
        label_height = 0.15 + 0.055 * max(map(len, labels), default=0)
        row_height = 1.55 + label_height
        height = 0.5 + rows * row_height
        figure = new_figure(width, height)
        for row in range(rows):
            part = slice(row * columns, (row + 1) * columns)
            bottom = height - 0.5 - (row + 1) * row_height + label_height
            axes = add_axes(figure, 0.55, bottom, width - 0.7, 1.35)
            _draw_bars(axes, labels[part], kinds[part], bits[part], columns)
        add_title(figure, "Bits by layer", f"a bar for each of {len(names)} layers")
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
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6.5)
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
    weight, which include levels, scales and gates. A column of the map ends at its step.
    """
    table = np.asarray(bits, float)
    with settings():
        labels, left, map_height = _map_layout(names)
        height = map_height + 2.35
        figure = new_figure(WIDTH, height)
        top = add_axes(figure, left, height - 1.3, WIDTH - left - 0.55, 0.85)
        _draw_average(top, steps, average, target)
        axes = add_axes(figure, left, 0.95, WIDTH - left - 0.55, map_height, sharex=top)
        mesh = _draw_map(axes, steps, labels, table)
        _add_color_bar(figure, mesh, left, "bits of a layer", ticks=range(1, 9))
        add_text(figure, WIDTH - 0.5, 0.95 + map_height + 0.08, "last", size=6)
        layers = f"the average above, a row for each of {len(names)} layers below"
        add_title(figure, "Bits over time", layers)
    return figure


def _map_layout(names: Sequence[str]) -> tuple[list[str], float, float]:
    """Return the labels of a map's rows, and its left edge and height in inches."""
    labels = [shorten(name.removesuffix(".weight"), 26) for name in names]
    left = max(0.65, 0.2 + 0.052 * max(map(len, labels), default=0))
    return labels, left, len(labels) * max(0.12, min(0.25, 1.3 / max(1, len(labels))))


def _add_color_bar(
    figure: Figure, mesh: ScalarMappable, left: float, label: str, **kwargs: Any
) -> None:
    color_axes = add_axes(figure, left, 0.3, 1.3, 0.1)
    bar = figure.colorbar(mesh, cax=color_axes, orientation="horizontal", **kwargs)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    add_text(figure, left + 1.45, 0.35, label)


def probabilities_over_time_figure(
    steps: Sequence[float], names: Sequence[str], probabilities: ArrayLike, bits: ArrayLike
) -> Figure:
    """Draw a map of each layer's DBP by step: the probability of the larger bit-width (SDQ).

    Both arrays are [steps, layers]; the probability is NaN for a layer that is not sampled. `bits`,
    the more probable bit-width, is written where it changes.
    """
    table, in_force = np.asarray(probabilities, float), np.asarray(bits, float)
    edges = _column_edges(steps)
    with settings():
        labels, left, map_height = _map_layout(names)
        figure = new_figure(WIDTH, map_height + 1.35)
        axes = add_axes(figure, left, 0.95, WIDTH - left - 0.25, map_height)
        mesh = axes.pcolormesh(
            edges,
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
                axes.text(edges[column], row + 0.5, label, fontsize=6, va="center", color=color)
        _add_color_bar(figure, mesh, left, "P(larger bit-width)")
        add_title(figure, "DBPs over time", f"a row for each of {len(names)} layers")
    return figure


def _draw_average(
    axes: Axes, steps: Sequence[float], average: Sequence[float], target: float | None
) -> None:
    axes.plot(steps, average, color=BLUE, lw=1.3, drawstyle="steps-pre")
    if target is not None:
        axes.axhline(target, color=VERMILLION, lw=1, ls="--")
        axes.annotate(
            f"target\n{target:g}",
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
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
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
    """Return the edges between columns that end at their steps.

    The first column is as wide as its neighbor, but does not begin before step 0.
    """
    ends = np.asarray(steps, float)
    width = ends[1] - ends[0] if len(ends) > 1 else 1.0
    return np.append(min(ends[0], max(0.0, ends[0] - width)), ends)
