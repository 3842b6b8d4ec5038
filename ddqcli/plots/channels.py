"""Weight ranges by output channel of a depthwise layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ddqcli.formatting import shorten
from ddqcli.plots.layout import WIDTH, add_axes, add_color_legend, add_text, add_title, new_figure
from ddqcli.plots.style import BLUE, GRAY, INK, ORANGE, settings

_MAX_SEPARATE = 128  # more channels are drawn as filled areas


def channels_figure(name: str, ranges: ArrayLike) -> Figure:
    """Draw the weight range of each channel.

    `ranges` [C, 5] holds minimum, lower quartile, median, upper quartile and maximum.
    """
    low, lower, median, upper, high = np.asarray(ranges, float).T
    channel = np.arange(len(low))
    with settings():
        figure = new_figure(WIDTH, 2.75)
        axes = add_axes(figure, 0.62, 0.72, WIDTH - 0.76, 1.55)
        if len(low) <= _MAX_SEPARATE:
            width = (WIDTH - 0.76) * 72 / max(len(low), 8)  # points per channel
            axes.vlines(channel, low, high, color=ORANGE, lw=max(0.6, 0.15 * width))
            axes.vlines(channel, lower, upper, color=BLUE, lw=max(1.0, 0.55 * width))
            axes.hlines(median, channel - 0.3, channel + 0.3, color=INK, lw=0.8)
        else:
            axes.fill_between(channel, low, high, color=ORANGE, alpha=0.75, step="mid", lw=0)
            axes.fill_between(channel, lower, upper, color=BLUE, step="mid", lw=0)
            axes.plot(channel, median, color=INK, lw=0.5, drawstyle="steps-mid")
        axes.axhline(0, color=GRAY, lw=0.5, zorder=0)
        axes.set_xlim(-0.7, len(low) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("output channel")
        axes.set_ylabel("weight")
        axes.grid(axis="y")
        add_title(figure, shorten(name, 52), "range of each channel", size=9)
        caption = f"depthwise, {len(low)} channels"
        if (typical := np.median(high - low)) > 0:
            caption += f"; widest over median range: {(high - low).max() / typical:.1f}"
        add_text(figure, 0.12, 2.39, caption)
        legend = {"min to max": ORANGE, "middle half": BLUE, "median": INK}
        add_color_legend(figure, 0.12, 0.14, legend)
    return figure
