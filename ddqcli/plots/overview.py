"""Overview sheets: the histograms of all layers as small panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from ddqcli.formatting import count, shorten
from ddqcli.plots.histogram import Layer, add_lines, bar_counts, format_tick, value_limits
from ddqcli.plots.layout import add_axes, add_color_legend, add_text, add_title, new_figure
from ddqcli.plots.style import GRAY, SHAPE_COLORS, settings

PER_SHEET = (5, 8)  # panels per row, rows
MAX_LEVELS_DRAWN = 64  # more would hide a panel's histogram
_MAX_BINS = 48
_PANEL_WIDTH, _PANEL_HEIGHT = 2.15, 1.35  # inches


def overview_figures(layers: Sequence[Layer]) -> list[Figure]:
    """Draw all layers as panels, 40 per sheet."""
    columns = min(PER_SHEET[0], max(3, int(np.ceil(np.sqrt(len(layers))))))
    panels = columns * PER_SHEET[1]
    sheets = [layers[first : first + panels] for first in range(0, len(layers), panels)]
    with settings():
        return [
            _sheet_figure(sheet, columns, number + 1, len(sheets))
            for number, sheet in enumerate(sheets)
        ]


def _sheet_figure(layers: Sequence[Layer], columns: int, number: int, sheets: int) -> Figure:
    """Draw one sheet on a single pair of axes; axes for each panel would take twice as long."""
    top, bottom = 0.62, 0.1
    width = 0.15 + columns * _PANEL_WIDTH
    height = top + -(-len(layers) // columns) * _PANEL_HEIGHT + bottom
    figure = new_figure(width, height)
    learned = any(layer.learned for layer in layers)
    title = "Weights and levels by layer" if learned else "Weights by layer"
    page = f", sheet {number} of {sheets}" if sheets > 1 else ""
    add_title(figure, title + page, f"a histogram for each of {len(layers)} layers")
    shapes = {layer.word for layer in layers}
    legend = {
        shape + " (log height)" * (shape == "heavy-tailed"): color
        for shape, color in SHAPE_COLORS.items()
        if shape in shapes
    }
    end = add_color_legend(figure, 0.15, height - 0.41, legend)
    if learned:
        add_text(figure, end, height - 0.41, f"|  levels, if {MAX_LEVELS_DRAWN} or fewer")
    canvas = add_axes(figure, 0, 0, width, height, xlim=(0, width), ylim=(0, height))
    canvas.set_axis_off()
    for k, layer in enumerate(layers):
        row, column = divmod(k, columns)
        left = 0.15 + column * _PANEL_WIDTH
        floor = height - top - (row + 1) * _PANEL_HEIGHT
        _draw_panel(canvas, layer, left, floor, _PANEL_WIDTH - 0.2)
    return figure


def _draw_panel(canvas: Axes, layer: Layer, left: float, floor: float, width: float) -> None:
    """Draw one layer with its lower left corner at (left, floor), in inches."""
    base, bar_height, (low, high) = floor + 0.28, 0.68, value_limits(layer)

    def x_of(values: ArrayLike) -> NDArray[Any]:
        margin = (high - low) * 0.02
        return left + (np.asarray(values) - low + margin) / (high - low + 2 * margin) * width

    color = SHAPE_COLORS.get(layer.word, GRAY)
    counts, log = bar_counts(layer, _MAX_BINS)
    if log:
        share = np.log(np.maximum(counts, 0.5) / 0.5) / np.log(2 * counts.max())
    else:
        share = counts / counts.max()
    if layer.counts_at_levels:
        x, line_width = x_of(layer.levels), min(2.5, 50 / len(counts))
        add_lines(canvas, x, base, x, base + bar_height * share, colors=color, lw=line_width)
    else:
        edges = x_of(np.linspace(low, high, len(counts) + 1))
        tops = base + bar_height * share
        canvas.add_artist(
            StepPatch(tops, edges, baseline=base, fc=to_rgba(color, 0.65), ec=color, lw=0.7)
        )
    if layer.learned and not layer.counts_at_levels and len(layer.levels) <= MAX_LEVELS_DRAWN:
        x = x_of(layer.levels)
        add_lines(canvas, x, base, x, base + bar_height, lw=0.4, alpha=0.6)
    inset = (high - low) * 0.1  # keeps tick labels clear of the next panel's
    ticks = np.asarray(MaxNLocator(4).tick_values(low, high))
    ticks = ticks[(ticks >= low + inset) & (ticks <= high - inset)]
    x = x_of(ticks)
    add_lines(canvas, [left, *x], [base, *x * 0 + base - 0.03], [left + width, *x], base)
    for tick_x, tick in zip(x, ticks, strict=True):
        canvas.text(tick_x, base - 0.05, format_tick(tick), fontsize=6, ha="center", va="top")
    name = shorten(layer.name.removesuffix(".weight"), 33)
    canvas.text(left, floor + 1.19, name, fontsize=7, fontweight="bold", va="center")
    caption = f"{layer.kind}, {count(sum(layer.counts))}, {layer.word}"
    canvas.text(left, floor + 1.06, caption, fontsize=6, va="center")
