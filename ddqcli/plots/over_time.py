"""Quantization error and levels (Fig. 5), and the loss, over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ddqcli.formatting import shorten
from ddqcli.plots.layout import (
    HEIGHT,
    WIDTH,
    add_axes,
    add_legend,
    add_title,
    limit_shares,
    new_figure,
)
from ddqcli.plots.style import BLUE, CYCLE, GRAY, GREEN, INK, SKY, VERMILLION, settings

DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))


def error_over_time_figure(
    steps: Sequence[float], errors: Mapping[str, Sequence[float]], named: int = 5
) -> Figure:
    """Draw each layer's relative quantization error |q - w|² / |w|² by step (Fig. 5a).

    The `named` layers with the largest last error get a color and a legend entry; the others are
    gray, with the median of all layers.
    """
    with settings():
        figure = new_figure(WIDTH, HEIGHT)
        names = list(errors)
        table = np.array([np.asarray(errors[name], float) for name in names])
        table = np.where(table > 0, table, np.nan)  # a log axis cannot show 0
        order = np.argsort(-np.nan_to_num(table[:, -1]), kind="stable")
        largest, others = order[:named], order[named:]
        legend_rows = -(-(len(largest) + 2 * bool(len(others))) // 2)
        bottom = 0.5 + 0.165 * legend_rows
        axes = add_axes(figure, 0.68, bottom, WIDTH - 0.85, HEIGHT - 0.4 - bottom)
        axes.plot(steps, table[others].T, color=GRAY, lw=0.6, alpha=0.6)
        for k, layer in enumerate(largest):
            label = shorten(names[layer].removesuffix(".weight"), 26)
            color, dashes = CYCLE[k % 6], DASHES[k % 5]
            axes.plot(steps, table[layer], color=color, ls=dashes, lw=1.3, label=label)
        if len(others):
            median = np.nanmedian(table, axis=0)
            axes.plot(steps, median, color=INK, lw=1.8, label="median of all layers")
            axes.plot([], [], color=GRAY, lw=0.6, label=f"the {len(others)} other layers")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlim(*_ends(steps))
        axes.set_xlabel("step")
        axes.set_ylabel("|q - w|² / |w|² (log)")
        axes.grid()
        add_legend(figure, 0, loc="lower left", ncols=2, handlelength=3)
        add_title(figure, "Quantization error over time", f"a line for each of {len(names)} layers")
    return figure


def levels_over_time_figure(
    name: str,
    steps: Sequence[float],
    levels: Sequence[Sequence[float]],
    edges: ArrayLike,
    counts: ArrayLike,
) -> Figure:
    """Draw one layer's levels by step beside the histogram of its weights (Fig. 5b).

    The number of levels may change between steps; before the first, every value of the 8-bit grid
    is a level. `edges` and `counts` are the histogram's.
    """
    with settings():
        figure = new_figure(WIDTH, HEIGHT)
        axes = add_axes(figure, 0.62, 0.85, 2.4, HEIGHT - 1.3)
        handles = _draw_levels(axes, steps, levels)
        handles.append(Line2D([], [], color=VERMILLION, lw=0.7, label="last levels"))
        handles.append(Patch(fc=BLUE, alpha=0.45, label="last float weights"))
        axes.set_xlim(*_ends(steps))
        axes.set_xlabel("step")
        axes.set_ylabel("level")
        axes.grid()
        right = add_axes(figure, 3.3, 0.85, 0.92, HEIGHT - 1.3, sharey=axes)
        right.stairs(
            counts, edges, orientation="horizontal", fill=True, color=BLUE, alpha=0.45, lw=0
        )
        whole_width = right.get_yaxis_transform()
        right.hlines(levels[-1], 0, 1, transform=whole_width, color=VERMILLION, lw=0.7, alpha=0.7)
        right.tick_params(labelleft=False, left=False)
        right.xaxis.set_major_locator(MaxNLocator(2))
        right.set_xlim(0)
        right.set_xlabel("weights per bin")
        add_legend(figure, 0, loc="lower left", ncols=3, handles=handles, handlelength=1.6)
        title = f"Levels over time: {shorten(name, 30)}"
        add_title(figure, title, f"{len(levels[-1])} levels at the end", size=9)
    return figure


def _draw_levels(
    axes: Axes, steps: Sequence[float], levels: Sequence[Sequence[float]]
) -> list[Artist]:
    """Draw the levels between changes of their number; return the entries of a legend."""
    changes = [k for k in range(1, len(levels)) if len(levels[k]) != len(levels[k - 1])]
    for first, end in pairwise([0, *changes, len(levels)]):
        part = np.array(levels[first:end], float)
        for k, series in enumerate(part.T):
            axes.plot(
                steps[first:end],
                series,
                color=(BLUE, SKY)[k % 2],
                lw=1.1 if part.shape[1] <= 16 else 0.6,
                marker="." if end - first == 1 else None,
                ms=3,
            )
        if first:
            axes.axvline(steps[first], color=GRAY, lw=0.7, ls=":")
    handles: list[Artist] = [Line2D([], [], color=BLUE, label="levels, in two blues")]
    if changes:
        handles.append(Line2D([], [], color=GRAY, ls=":", label="another bit-width"))
    if steps[0] > 0:
        handles.append(Patch(fc=GRAY, alpha=0.2, label="8 bits: the full grid"))
        axes.axvspan(0, steps[0], color=GRAY, alpha=0.2, lw=0)
    return handles


def loss_over_time_figure(
    steps: Sequence[float],
    loss: Sequence[float],
    accuracy: Sequence[float],
    looks: Sequence[tuple[float, float, float]] = (),
    delivered_step: float | None = None,
    metric: str = "accuracy, %",
    batch_norm_step: float | None = None,
) -> Figure:
    """Draw the loss above the accuracy, or another metric, by step.

    Lines are of training batches. Points are of `looks` at held-out samples: step, loss, accuracy.
    Vertical lines mark `delivered_step` and `batch_norm_step`, from which BatchNorm's statistics
    are frozen. `metric` is the name and unit of accuracies.
    """
    with settings():
        figure = new_figure(WIDTH, HEIGHT)
        top = add_axes(figure, 0.68, 1.85, WIDTH - 0.85, HEIGHT - 2.25)
        axes = add_axes(figure, 0.68, 0.85, WIDTH - 0.85, 0.85, sharex=top)
        look_steps, *look_values = zip(*looks, strict=True) if looks else ((), (), ())
        for each, training, held_out in zip(
            (top, axes), (loss, accuracy), look_values, strict=True
        ):
            each.plot(steps, training, color=BLUE, lw=1.2, label="training batches")
            if looks:
                style: Any = {"color": VERMILLION, "ms": 4, "clip_on": False}
                each.plot(look_steps, held_out, "o", label="held-out samples", **style)
            if batch_norm_step is not None:
                label = f"BatchNorm frozen: step {batch_norm_step:,}"
                each.axvline(batch_norm_step, color=GREEN, lw=1, ls="--", label=label)
            if delivered_step is not None:
                label = f"delivered: {f'step {delivered_step:,}' if delivered_step else 'start'}"
                each.axvline(delivered_step, color=INK, lw=1, ls=":", label=label)
            each.grid()
            each.yaxis.set_major_locator(MaxNLocator(5))
        top.set_ylabel("loss")
        if min([*loss, *look_values[0]]) >= 0:
            top.set_ylim(bottom=0)
        top.tick_params(labelbottom=False)
        limit_shares(axes, [*accuracy, *look_values[1]], metric)
        axes.set_xlim(*_ends([*steps, *look_steps]))
        axes.set_xlabel("step")
        add_legend(figure, 0, loc="lower left", ncols=2, handles=top.get_legend_handles_labels()[0])
        add_title(figure, "Loss over time", f"above {metric.partition(',')[0]}")
    return figure


def _ends(steps: Sequence[float]) -> tuple[float, float]:
    """Return the limits of a step axis, which begins at 0."""
    return 0, max([1, *steps])
