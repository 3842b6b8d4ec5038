"""Pictures of weights: a layer's histogram with its levels (Fig. 1 b to d), all layers on sheets, ranges by channel."""

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

from ddqcli.formatting import count, shorten
from ddqcli.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    new_figure,
    place,
    settings,
    squares,
    write,
)

WORD_COLOURS = {
    "Gaussian-like": BLUE,
    "heavy-tailed": ORANGE,
    "multi-peaked": GREEN,
    "flat": PURPLE,
    "as stored": SKY,  # of an exported file only values on levels are known
}
PER_SHEET = (5, 8)  # panels across and down
FEW_LEVELS = 64  # that a panel of a sheet has room for
_ENGINEERING = EngFormatter(sep="")  # 1.5k


@dataclass(frozen=True)
class Layer:
    """A layer's weights for drawing: how many lie in each of equal bins over [low, high], and its levels if any."""

    name: str
    kind: str
    word: str  # the distribution's shape in a word
    low: float
    high: float
    counts: Sequence[int]
    levels: Sequence[float] = ()
    levels_name: str = ""  # what the levels are: "learned levels (3 bits)"
    learned: bool = False  # levels of a trained model are drawn on the sheets too
    counts_at_levels: bool = (
        False  # instead of bins: how many values are stored at each of the levels
    )


def layer_figure(layer: Layer) -> Figure:
    """One layer's histogram with its levels over it, 4.4 by 2.75 inches."""
    with settings():
        figure = new_figure(4.4, 2.75)
        axes = place(figure, 0.62, 0.72, 3.64, 1.55)
        _histogram(axes, layer)
        _axes(axes, layer)
        write(figure, 0.12, 2.57, shorten(layer.name, 52), size=9, bold=True)
        write(figure, 0.12, 2.39, f"{layer.kind}, {sum(layer.counts):,} weights, {layer.word}")
        if len(layer.levels):
            write(figure, 0.12, 0.15, "|", size=10, bold=True)
        if layer.levels_name:
            write(figure, 0.24, 0.14, layer.levels_name)
    return figure


def overview_figures(layers: Sequence[Layer]) -> list[Figure]:
    """All layers as small panels, 40 to a sheet."""
    across = min(PER_SHEET[0], max(3, int(np.ceil(np.sqrt(len(layers))))))
    room = across * PER_SHEET[1]
    sheets = [layers[first : first + room] for first in range(0, len(layers), room)]
    with settings():
        return [
            _sheet(sheet, across, number + 1, len(sheets)) for number, sheet in enumerate(sheets)
        ]


def _sheet(layers: Sequence[Layer], across: int, number: int, sheets: int) -> Figure:
    """Panels drawn by hand on one canvas in inches: axes of their own would take twice as long."""
    panel_width, panel_height, top, bottom = 2.15, 1.35, 0.62, 0.1
    width, height = (
        0.15 + across * panel_width,
        top + -(-len(layers) // across) * panel_height + bottom,
    )
    figure = new_figure(width, height)
    title = (
        "Weights and levels by layer"
        if any(layer.learned for layer in layers)
        else "Weights by layer"
    )
    page = f", sheet {number} of {sheets}" if sheets > 1 else ""
    write(figure, 0.15, height - 0.18, title + page, size=11, bold=True)
    words = {layer.word for layer in layers}
    legend = {
        word + " (log height)" * (word == "heavy-tailed"): c
        for word, c in WORD_COLOURS.items()
        if word in words
    }
    squares(figure, 0.15, height - 0.41, legend)
    canvas = place(figure, 0, 0, width, height, xlim=(0, width), ylim=(0, height))
    canvas.set_axis_off()
    for k, layer in enumerate(layers):
        row, column = divmod(k, across)
        left, floor = 0.15 + column * panel_width, height - top - (row + 1) * panel_height
        _panel(canvas, layer, left, floor, panel_width - 0.2)
    return figure


def _panel(canvas: Axes, layer: Layer, left: float, floor: float, width: float) -> None:
    base, room, low, high = floor + 0.28, 0.68, *_reach(layer)

    def at(values: Sequence[float]) -> np.ndarray:
        margin = (high - low) * 0.02
        return left + (np.asarray(values) - low + margin) / (high - low + 2 * margin) * width

    colour = WORD_COLOURS.get(layer.word, GREY)
    counts, log = _bins(layer, 48)
    share = (
        np.log(np.maximum(counts, 0.5) / 0.5) / np.log(2 * counts.max())
        if log
        else counts / counts.max()
    )
    if layer.counts_at_levels:
        x, wide = at(layer.levels), min(2.5, 50 / len(counts))
        _lines(canvas, x, base, x, base + room * share, colors=colour, lw=wide)
    else:
        edges = at(np.linspace(low, high, len(counts) + 1))
        fill = StepPatch(
            base + room * share, edges, baseline=base, fc=to_rgba(colour, 0.65), ec=colour, lw=0.7
        )
        canvas.add_artist(fill)
    if layer.learned and not layer.counts_at_levels and len(layer.levels) <= FEW_LEVELS:
        x = at(layer.levels)
        _lines(canvas, x, base, x, base + room, lw=0.4, alpha=0.6)
    inset = (high - low) * 0.1  # room for the labels of the panel beside
    ticks = MaxNLocator(4).tick_values(low, high)
    ticks = ticks[(ticks >= low + inset) & (ticks <= high - inset)]
    x = at(ticks)
    _lines(canvas, [left, *x], [base, *x * 0 + base - 0.03], [left + width, *x], base)
    for place_, tick in zip(x, ticks, strict=True):
        canvas.text(place_, base - 0.05, _number(tick), fontsize=6, ha="center", va="top")
    canvas.text(
        left,
        floor + 1.19,
        shorten(layer.name.removesuffix(".weight"), 33),
        fontsize=7,
        fontweight="bold",
        va="center",
    )
    canvas.text(
        left,
        floor + 1.06,
        f"{layer.kind}, {count(sum(layer.counts))}, {layer.word}",
        fontsize=6,
        va="center",
    )


def channels_figure(name: str, ranges: np.ndarray) -> Figure:
    """Ranges by output channel of a depthwise layer; `ranges` [C, 5]: min, quartiles and median ascending, max."""
    with settings():
        figure = new_figure(6.4, 2.75)
        axes = place(figure, 0.68, 0.72, 5.55, 1.55)
        low, lower, median, upper, high = np.asarray(ranges, float).T
        channel = np.arange(len(low))
        if len(low) <= 128:
            width = 5.55 * 72 / max(len(low), 8)  # points a channel has
            axes.vlines(channel, low, high, color=ORANGE, lw=max(0.6, 0.15 * width))
            axes.vlines(channel, lower, upper, color=BLUE, lw=max(1.0, 0.55 * width))
            axes.hlines(median, channel - 0.3, channel + 0.3, color=INK, lw=0.8)
        else:
            axes.fill_between(channel, low, high, color=ORANGE, alpha=0.75, step="mid", lw=0)
            axes.fill_between(channel, lower, upper, color=BLUE, step="mid", lw=0)
            axes.plot(channel, median, color=INK, lw=0.5, drawstyle="steps-mid")
        axes.axhline(0, color=GREY, lw=0.5, zorder=0)
        axes.set_xlim(-0.7, len(low) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("output channel")
        axes.set_ylabel("weight")
        axes.grid(axis="y")
        write(figure, 0.12, 2.57, shorten(name, 72), size=9, bold=True)
        reach = high - low
        spread = (
            f"; widest over median range: {reach.max() / np.median(reach):.1f}"
            if np.median(reach) > 0
            else ""
        )
        write(figure, 0.12, 2.39, f"depthwise, {len(low)} channels{spread}")
        squares(figure, 0.12, 0.14, {"min to max": ORANGE, "middle half": BLUE, "median": INK})
    return figure


def _histogram(axes: Axes, layer: Layer) -> None:
    """Filled steps, log where tails are heavy; levels as lines from a rug below the axis up through the histogram."""
    colour, (low, high), across = (
        WORD_COLOURS.get(layer.word, GREY),
        _reach(layer),
        axes.get_xaxis_transform(),
    )
    counts, log = _bins(layer, 96)
    floor = 0.5 if log else 0
    if layer.counts_at_levels:
        _lines(
            axes,
            layer.levels,
            0,
            layer.levels,
            layer.counts,
            colors=colour,
            lw=min(4, 150 / len(layer.levels)),
        )
    else:
        edges = np.linspace(low, high, len(counts) + 1)
        axes.add_artist(
            StepPatch(counts, edges, baseline=floor, fc=to_rgba(colour, 0.65), ec=colour, lw=0.7)
        )
    if log:
        axes.set_yscale("log")
    axes.set_ylim(floor, counts.max() * (1.6 if log else 1.06))
    margin = (high - low) * 0.02
    axes.set_xlim(low - margin, high + margin)
    if len(layer.levels):
        if not layer.counts_at_levels:
            _lines(axes, layer.levels, 0, layer.levels, 1, across, alpha=0.55)
        _lines(axes, layer.levels, -0.06, layer.levels, 0, across, lw=1.2)


def _axes(axes: Axes, layer: Layer) -> None:
    """Both axes as plain lines and texts: matplotlib's own take two thirds of a picture's time."""
    axes.set_axis_off()
    across, up, whole = axes.get_xaxis_transform(), axes.get_yaxis_transform(), axes.transAxes
    (low, high), top, log = _reach(layer), axes.get_ylim()[1], axes.get_yscale() == "log"
    x, y = MaxNLocator(7).tick_values(low, high), MaxNLocator(6, integer=True).tick_values(0, top)
    if log:
        y = 10.0 ** np.arange(np.log10(top))
    x, y = x[(x >= low) & (x <= high)], y[y <= top]
    length = 0.054 if len(layer.levels) else 0.031  # below the rug
    _lines(axes, [0, 0], [0, 0], [1, 0], [0, 1], whole)
    _lines(axes, x, -length, x, 0, across)
    _lines(axes, -0.013, y, 0, y, up)
    _lines(axes, 0, y, 1, y, up, colors=GREY, lw=0.4, alpha=0.35, zorder=0.5)
    for tick in x:
        axes.text(
            tick, -length - 0.03, _number(tick), fontsize=7, ha="center", va="top", transform=across
        )
    for tick in y:
        axes.text(
            -0.025, tick, _ENGINEERING(tick), fontsize=7, ha="right", va="center", transform=up
        )
    each = f"weights per {'level' if layer.counts_at_levels else 'bin'}{' (log)' * log}"
    axes.text(0.5, -0.21, "weight", ha="center", va="top", transform=whole)
    axes.text(-0.14, 0.5, each, rotation=90, ha="center", va="center", transform=whole)


def _lines(
    axes: Axes, x0: Any, y0: Any, x1: Any, y1: Any, transform: Any = None, **style: Any
) -> None:
    """Straight lines, each coordinate one number or a row of them. They do not move the limits, which takes its time."""
    ends = np.stack(np.broadcast_arrays(x0, y0, x1, y1), -1).reshape(-1, 2, 2)
    style = {"colors": INK, "lw": 0.6, "clip_on": False, **style}
    axes.add_artist(LineCollection(ends, transform=transform or axes.transData, **style))


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _reach(layer: Layer) -> tuple[float, float]:
    return (layer.low, layer.high) if layer.high > layer.low else (layer.low - 0.5, layer.low + 0.5)


def _bins(layer: Layer, most: int) -> tuple[np.ndarray, bool]:
    """The counts to draw, and whether on a log axis."""
    counts = np.asarray(layer.counts, float)
    if not layer.counts_at_levels:
        counts = _coarser(counts, most)
    return counts, layer.word == "heavy-tailed" and counts.max() > 20


def _coarser(counts: np.ndarray, most: int) -> np.ndarray:
    """Counts in fewer bins, a divisor of those there are: about 2 n^(1/3) (Rice's rule), at most `most`."""
    wanted = min(
        most, max(16.0, 2.8 * counts.sum() ** (1 / 3))
    )  # up to 1.4 times, as divisors are rare
    bins = next(
        (b for b in range(len(counts), 1, -1) if len(counts) % b == 0 and b <= wanted), len(counts)
    )
    coarser: np.ndarray = counts.reshape(bins, -1).sum(1)
    return coarser
