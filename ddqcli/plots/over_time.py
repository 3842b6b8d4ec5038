"""Quantization error and levels (Fig. 5), and the loss, over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ddqcli.formatting import shorten
from ddqcli.plots.layout import add_axes, add_legend, add_title, new_figure
from ddqcli.plots.style import BLUE, CYCLE, GRAY, INK, SKY, VERMILLION, settings

DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))


def error_over_time_figure(
    steps: Sequence[float], errors: Mapping[str, Sequence[float]], named: int = 5
) -> Figure:
    """Draw each layer's relative quantization error |q - w|² / |w|² by step (Fig. 5a).

    The `named` layers with the largest last error get a color and a legend entry; the others are
    gray, with the median of all layers.
    """
    with settings():
        figure = new_figure(6.4, 4.1)
        names = list(errors)
        table = np.array([np.asarray(errors[name], float) for name in names])
        table = np.where(table > 0, table, np.nan)  # a log axis cannot show 0
        order = np.argsort(-np.nan_to_num(table[:, -1]), kind="stable")
        largest, others = order[:named], order[named:]
        legend_rows = -(-(len(largest) + 2 * bool(len(others))) // 2)
        bottom = 0.62 + 0.165 * legend_rows
        axes = add_axes(figure, 0.75, bottom, 5.45, 3.65 - bottom)
        axes.plot(steps, table[others].T, color=GRAY, lw=0.6, alpha=0.6)
        for k, layer in enumerate(largest):
            label = shorten(names[layer].removesuffix(".weight"), 34)
            color, dashes = CYCLE[k % 6], DASHES[k % 5]
            axes.plot(steps, table[layer], color=color, ls=dashes, lw=1.3, label=label)
        if len(others):
            median = np.nanmedian(table, axis=0)
            axes.plot(steps, median, color=INK, lw=1.8, label="median of all layers")
            axes.plot([], [], color=GRAY, lw=0.6, label=f"the {len(others)} other layers")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("step")
        axes.set_ylabel("relative error |q - w|² / |w|² (log)")
        axes.grid()
        add_legend(figure, 0, loc="lower left", ncols=2, handlelength=3)
        add_title(figure, "Quantization error over time")
    return figure


def levels_over_time_figure(
    name: str,
    steps: Sequence[float],
    levels: Sequence[Sequence[float]],
    edges: ArrayLike,
    counts: ArrayLike,
) -> Figure:
    """Draw one layer's levels by step beside the histogram of its weights (Fig. 5b).

    The number of levels may change between steps. `edges` and `counts` are the histogram's.
    """
    with settings():
        figure = new_figure(5.6, 3.4)
        axes = add_axes(figure, 0.75, 0.55, 3.3, 2.25)
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
        axes.set_xlabel("step")
        axes.set_ylabel("level")
        axes.grid()
        right = add_axes(figure, 4.25, 0.55, 1.2, 2.25, sharey=axes)
        right.stairs(
            counts, edges, orientation="horizontal", fill=True, color=BLUE, alpha=0.45, lw=0
        )
        whole_width = right.get_yaxis_transform()
        right.hlines(levels[-1], 0, 1, transform=whole_width, color=VERMILLION, lw=0.7, alpha=0.7)
        right.tick_params(labelleft=False, left=False)
        right.xaxis.set_major_locator(MaxNLocator(2))
        right.set_xlim(0)
        right.set_xlabel("weights per bin")
        right.set_title("last levels", fontsize=7, color=VERMILLION)
        add_title(figure, f"Levels over time: {shorten(name, 42)}")
    return figure


def loss_over_time_figure(
    steps: Sequence[float],
    loss: Sequence[float],
    accuracy: Sequence[float],
    looks: Sequence[tuple[float, float, float]] = (),
    delivered_step: float | None = None,
    metric: str = "accuracy, %",
) -> Figure:
    """Draw the loss above the accuracy, or another metric, by step.

    Lines are of training batches. Points are of `looks` at held-out samples: step, loss, accuracy.
    A vertical line marks `delivered_step`. `metric` is the name and unit of accuracies.
    """
    with settings():
        figure = new_figure(6.4, 3.9)
        top = add_axes(figure, 0.75, 1.95, 5.45, 1.5)
        axes = add_axes(figure, 0.75, 0.55, 5.45, 1.15, sharex=top)
        look_steps, *look_values = zip(*looks, strict=True) if looks else ((), (), ())
        for each, training, held_out in zip(
            (top, axes), (loss, accuracy), look_values, strict=True
        ):
            each.plot(steps, training, color=BLUE, lw=1.2, label="training batches")
            if looks:
                each.plot(
                    look_steps, held_out, "o", color=VERMILLION, ms=4, label="held-out samples"
                )
            if delivered_step is not None:
                label = f"delivered: {f'step {delivered_step:,}' if delivered_step else 'start'}"
                each.axvline(delivered_step, color=INK, lw=0.9, ls=":", label=label)
            each.grid()
            each.yaxis.set_major_locator(MaxNLocator(5))
        top.set_ylabel("loss")
        top.set_ylim(bottom=0)
        top.tick_params(labelbottom=False)
        top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.3)
        axes.set_ylabel(metric)
        if metric == "accuracy, %":
            axes.set_ylim(max(0, min([*accuracy, *look_values[1]]) - 2), 100.5)
        axes.set_xlabel("step")
        add_title(figure, "Loss over time")
    return figure
