"""Pictures of weights: a layer's histogram with its levels (Fig. 1 b to d), all layers on sheets, ranges by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddqcli.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, new_figure, place, settings, shorten

WORD_COLOURS = {"Gaussian-like": BLUE, "heavy-tailed": ORANGE, "multi-peaked": GREEN, "flat": PURPLE}
PER_SHEET = (5, 8)  # panels across and down


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


def layer_figure(layer: Layer) -> Figure:
    """One layer's histogram with its levels over it, 4.4 by 2.9 inches."""
    with settings():
        figure = new_figure(4.4, 2.9)
        axes = place(figure, 0.62, 0.82, 3.64, 1.6)
        _histogram(axes, layer)
        axes.set_xlabel("weight")
        axes.set_ylabel("weights per bin" + (" (log)" if axes.get_yscale() == "log" else ""))
        axes.grid(axis="y")
        total = sum(layer.counts)
        figure.text(0.12 / 4.4, 2.7 / 2.9, shorten(layer.name, 52), fontsize=9, fontweight="bold", va="center")
        figure.text(0.12 / 4.4, 2.53 / 2.9, f"{layer.kind}, {total:,} weights, {layer.word}", fontsize=7.5, va="center")
        if len(layer.levels):
            figure.text(0.12 / 4.4, 0.16 / 2.9, "|", color=VERMILLION, fontsize=10, fontweight="bold", va="center")
            figure.text(0.24 / 4.4, 0.15 / 2.9, layer.levels_name, fontsize=7.5, va="center")
    return figure


def overview_figures(layers: Sequence[Layer]) -> list[Figure]:
    """All layers as small panels, 40 to a sheet."""
    across = min(PER_SHEET[0], max(2, int(np.ceil(np.sqrt(len(layers))))))
    room = across * PER_SHEET[1]
    sheets = [layers[first : first + room] for first in range(0, len(layers), room)]
    with settings():
        return [_sheet(sheet, across, number + 1, len(sheets)) for number, sheet in enumerate(sheets)]


def _sheet(layers: Sequence[Layer], across: int, number: int, sheets: int) -> Figure:
    panel_width, panel_height, top, bottom = 2.15, 1.35, 0.62, 0.1
    down = -(-len(layers) // across)
    width, height = 0.15 + across * panel_width, top + down * panel_height + bottom
    figure = new_figure(width, height)
    page = f", sheet {number} of {sheets}" if sheets > 1 else ""
    figure.text(0.15 / width, 1 - 0.18 / height, f"Weights by layer{page}", fontsize=11, fontweight="bold", va="center")
    for k, (word, colour) in enumerate(WORD_COLOURS.items()):
        x = (0.15 + 1.05 * k) / width
        figure.text(x, 1 - 0.41 / height, "■", color=colour, fontsize=8, va="center")
        figure.text(x + 0.13 / width, 1 - 0.41 / height, word, fontsize=7.5, va="center")
    for k, layer in enumerate(layers):
        row, column = divmod(k, across)
        left, floor = 0.15 + column * panel_width, height - top - (row + 1) * panel_height
        axes = place(figure, left, floor + 0.28, panel_width - 0.2, 0.68)
        _histogram(axes, layer, small=True)
        axes.set_yticks([], [])
        axes.minorticks_off()
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=6, length=2, pad=1.5)
        name = shorten(layer.name.removesuffix(".weight"), 34)
        figure.text(left / width, (floor + 1.19) / height, name, fontsize=7, fontweight="bold", va="center")
        what = f"{layer.kind}, {_short(sum(layer.counts))}, {layer.word}"
        figure.text(left / width, (floor + 1.06) / height, what, fontsize=6, va="center")
    return figure


def channels_figure(name: str, ranges: np.ndarray) -> Figure:
    """Ranges by output channel of a depthwise layer; `ranges` [C, 5]: min, quartiles and median ascending, max."""
    with settings():
        figure = new_figure(6.4, 2.9)
        axes = place(figure, 0.68, 0.82, 5.55, 1.6)
        low, lower, median, upper, high = np.asarray(ranges, float).T
        channel = np.arange(len(low))
        if len(low) <= 128:
            width = 5.55 * 72 / max(len(low), 8)  # points a channel has
            axes.vlines(channel, low, high, color=ORANGE, lw=max(0.6, 0.15 * width))
            axes.vlines(channel, lower, upper, color=BLUE, lw=max(1.0, 0.55 * width))
            axes.hlines(median, channel - 0.3, channel + 0.3, color=INK, lw=0.8)
        else:
            step = {"step": "mid", "lw": 0}
            axes.fill_between(channel, low, high, color=ORANGE, alpha=0.75, **step)
            axes.fill_between(channel, lower, upper, color=BLUE, **step)
            axes.plot(channel, median, color=INK, lw=0.5, drawstyle="steps-mid")
        axes.axhline(0, color=GREY, lw=0.5, zorder=0)
        axes.set_xlim(-0.7, len(low) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("output channel")
        axes.set_ylabel("weight")
        axes.grid(axis="y")
        figure.text(0.12 / 6.4, 2.7 / 2.9, shorten(name, 72), fontsize=9, fontweight="bold", va="center")
        reach = high - low
        spread = f"; widest over median range: {reach.max() / np.median(reach):.1f}" if np.median(reach) > 0 else ""
        figure.text(0.12 / 6.4, 2.53 / 2.9, f"depthwise, {len(low)} channels{spread}", fontsize=7.5, va="center")
        for k, (mark, text) in enumerate({ORANGE: "min to max", BLUE: "middle half", INK: "median"}.items()):
            figure.text((0.12 + 1.1 * k) / 6.4, 0.15 / 2.9, "■", color=mark, fontsize=8, va="center")
            figure.text((0.26 + 1.1 * k) / 6.4, 0.15 / 2.9, text, fontsize=7.5, va="center")
    return figure


def _histogram(axes: Axes, layer: Layer, small: bool = False) -> None:
    """Filled steps, log where tails are heavy; levels as lines from a rug below the axis up through the histogram."""
    counts = _coarser(np.asarray(layer.counts, float), 48 if small else 96)
    low, high = (layer.low, layer.high) if layer.high > layer.low else (layer.low - 0.5, layer.low + 0.5)
    edges = np.linspace(low, high, len(counts) + 1)
    colour = WORD_COLOURS.get(layer.word, GREY)
    log = layer.word == "heavy-tailed" and counts.max() > 20
    axes.stairs(counts, edges, fill=True, color=colour, alpha=0.55, lw=0, baseline=0.5 if log else 0)
    axes.stairs(counts, edges, color=colour, lw=0.7, baseline=0.5 if log else 0)
    if log:
        axes.set_yscale("log")
    axes.set_ylim(0.5 if log else 0, counts.max() * (1.6 if log else 1.06))
    margin = (high - low) * 0.02
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(4 if small else 7))
    if len(layer.levels) and not small:
        across = axes.get_xaxis_transform()
        axes.vlines(layer.levels, 0, 1, color=VERMILLION, lw=0.7, alpha=0.6, transform=across)
        axes.vlines(layer.levels, -0.06, 0, color=VERMILLION, lw=1.2, transform=across, clip_on=False)
        axes.tick_params(axis="x", length=6)


def _coarser(counts: np.ndarray, most: int) -> np.ndarray:
    """Counts in fewer bins: about 2 n^(1/3) (Rice's rule), at most `most`; a divisor of the bins there are."""
    wanted = min(most, max(8.0, 2 * counts.sum() ** (1 / 3)))
    bins = next((b for b in range(len(counts), 1, -1) if len(counts) % b == 0 and b <= wanted), len(counts))
    return counts.reshape(bins, -1).sum(1)


def _short(count: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.0f}"
