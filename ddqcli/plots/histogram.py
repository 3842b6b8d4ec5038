"""Histogram of one layer's weights with its quantization levels (Fig. 1b to d)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from ddqcli.formatting import shorten
from ddqcli.plots.layout import (
    WIDTH,
    add_axes,
    add_color_legend,
    add_text,
    add_title,
    new_figure,
)
from ddqcli.plots.style import GRAY, INK, SHAPE_COLORS, settings

_MAX_BINS = 96
_format_count = EngFormatter(sep="")  # 1.5k


@dataclass(frozen=True)
class Layer:
    """A layer's weights as a figure shows them: counts in equal bins over [low, high], and levels.

    With `counts_at_levels`, `counts` holds the number of weights at each level instead.
    """

    name: str
    kind: str
    word: str  # shape of the distribution, a key of SHAPE_COLORS or any other text
    low: float
    high: float
    counts: Sequence[int]
    levels: Sequence[float] = ()
    levels_name: str = ""  # caption of the levels: "learned levels (3 bits)"
    learned: bool = False  # from a trained model; overview sheets draw learned levels only
    counts_at_levels: bool = False


def layer_figure(layer: Layer) -> Figure:
    """Draw one layer's histogram and its levels, 4.4 by 2.75 inches."""
    with settings():
        figure = new_figure(WIDTH, 2.75)
        axes = add_axes(figure, 0.62, 0.72, WIDTH - 0.76, 1.55)
        _draw_histogram(axes, layer)
        _draw_axes(axes, layer)
        caption = f"{layer.word}: {sum(layer.counts):,} weights, {layer.kind}"
        add_title(figure, shorten(layer.name, 52), f"{caption}; {layer.levels_name}", size=9)
        add_color_legend(figure, 0.12, 2.38, {caption: SHAPE_COLORS.get(layer.word, GRAY)})
        if len(layer.levels):
            add_text(figure, 0.12, 0.15, "|", size=10, bold=True)
        if layer.levels_name:
            add_text(figure, 0.24, 0.14, layer.levels_name)
    return figure


def _draw_histogram(axes: Axes, layer: Layer) -> None:
    """Draw the counts, and each level as a line from a rug below the axis up to the top."""
    color = SHAPE_COLORS.get(layer.word, GRAY)
    low, high = value_limits(layer)
    counts, log = bar_counts(layer, _MAX_BINS)
    floor = 0.5 if log else 0
    if layer.counts_at_levels:
        width = min(4, 150 / len(layer.levels))
        add_lines(axes, layer.levels, 0, layer.levels, layer.counts, colors=color, lw=width)
    else:
        edges = np.linspace(low, high, len(counts) + 1)
        axes.add_artist(
            StepPatch(counts, edges, baseline=floor, fc=to_rgba(color, 0.65), ec=color, lw=0.7)
        )
    if log:
        axes.set_yscale("log")
    axes.set_ylim(floor, counts.max() * (1.6 if log else 1.06))
    margin = (high - low) * 0.02
    axes.set_xlim(low - margin, high + margin)
    if len(layer.levels):
        x_data = axes.get_xaxis_transform()  # x in data coordinates, y as a share of the axes
        if not layer.counts_at_levels:
            add_lines(axes, layer.levels, 0, layer.levels, 1, x_data, alpha=0.55)
        add_lines(axes, layer.levels, -0.06, layer.levels, 0, x_data, lw=1.2)


def _draw_axes(axes: Axes, layer: Layer) -> None:
    """Draw both axes as plain lines and text; matplotlib's own triple a figure's time."""
    axes.set_axis_off()
    (low, high), top, log = value_limits(layer), axes.get_ylim()[1], axes.get_yscale() == "log"
    x_data, y_data, share = axes.get_xaxis_transform(), axes.get_yaxis_transform(), axes.transAxes
    x = np.asarray(MaxNLocator(7).tick_values(low, high))
    y = np.asarray(MaxNLocator(6, integer=True).tick_values(0, top))
    if log:
        y = 10.0 ** np.arange(np.log10(top))
    x, y = x[(x >= low) & (x <= high)], y[y <= top]
    length = 0.054 if len(layer.levels) else 0.031  # ticks reach below the rug of levels
    add_lines(axes, [0, 0], [0, 0], [1, 0], [0, 1], share)
    add_lines(axes, x, -length, x, 0, x_data)
    add_lines(axes, -0.013, y, 0, y, y_data)
    add_lines(axes, 0, y, 1, y, y_data, colors=GRAY, lw=0.4, alpha=0.35, zorder=0.5)
    for tick in x:
        axes.text(
            tick,
            -length - 0.03,
            format_tick(tick),
            fontsize=7,
            ha="center",
            va="top",
            transform=x_data,
        )
    for tick in y:
        axes.text(
            -0.025, tick, _format_count(tick), fontsize=7, ha="right", va="center", transform=y_data
        )
    label = f"weights per {'level' if layer.counts_at_levels else 'bin'}{' (log)' * log}"
    axes.text(0.5, -0.21, "weight", ha="center", va="top", transform=share)
    axes.text(-0.14, 0.5, label, rotation=90, ha="center", va="center", transform=share)


# ---- shared with the overview


def add_lines(
    axes: Axes,
    x0: ArrayLike,
    y0: ArrayLike,
    x1: ArrayLike,
    y1: ArrayLike,
    transform: Any = None,
    **style: Any,
) -> None:
    """Add lines from (x0, y0) to (x1, y1); coordinates broadcast. Axis limits do not move."""
    ends: Any = np.stack(np.broadcast_arrays(x0, y0, x1, y1), -1).reshape(-1, 2, 2)
    style = {"colors": INK, "lw": 0.6, "clip_on": False, **style}
    axes.add_artist(LineCollection(ends, transform=transform or axes.transData, **style))


def format_tick(value: float) -> str:
    """Format a tick label with up to six digits and a typographic minus sign."""
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def value_limits(layer: Layer) -> tuple[float, float]:
    """Return the range of the value axis, of width 1 for a constant layer."""
    return (layer.low, layer.high) if layer.high > layer.low else (layer.low - 0.5, layer.low + 0.5)


def bar_counts(layer: Layer, max_bins: int) -> tuple[NDArray[Any], bool]:
    """Return the bar heights, and True if they belong on a log axis."""
    counts = np.asarray(layer.counts, float)
    if not layer.counts_at_levels:
        counts = merge_bins(counts, max_bins)
    return counts, bool(layer.word == "heavy-tailed" and counts.max() > 20)


def merge_bins(counts: NDArray[Any], max_bins: int) -> NDArray[Any]:
    """Sum neighboring bins until about 2 n^(1/3) are left (Rice's rule), at most `max_bins`.

    The number of bins left divides the number given. Since divisors are rare, up to 1.4 times
    Rice's number is accepted.
    """
    limit = min(max_bins, max(16.0, 2.8 * counts.sum() ** (1 / 3)))
    divisors = (b for b in range(len(counts), 1, -1) if len(counts) % b == 0)
    bins = next((b for b in divisors if b <= limit), len(counts))
    merged: NDArray[Any] = counts.reshape(bins, -1).sum(1)
    return merged
