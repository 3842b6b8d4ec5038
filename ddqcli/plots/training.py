"""Pictures of a finetuning: bits by layer (Fig. 3), bits over time (Fig. 4), error and levels over time (Fig. 5), loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import LogLocator, MaxNLocator

from ddqcli.formatting import shorten
from ddqcli.plots.style import (
    BLUE,
    CYCLE,
    GREY,
    INK,
    KIND_COLOURS,
    KIND_HATCHES,
    PAPER,
    SKY,
    VERMILLION,
    new_figure,
    place,
    settings,
    write,
)

MAX_BITS = 8
BARS_A_ROW = 40
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))


def bits_by_layer_figure(
    names: Sequence[str], kinds: Sequence[str], bits: Sequence[float]
) -> Figure:
    """Bars of each layer's bits, coloured and hatched by kind, 40 layers to a row (Fig. 3)."""
    rows = max(1, -(-len(names) // BARS_A_ROW))
    across = -(-len(names) // rows)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 32 if rows == 1 else 24) for name in names]
        below = 0.15 + 0.05 * max(map(len, labels), default=0)
        width, panel = max(4.4, 0.75 + 0.2 * across), 1.55 + below
        height = 0.5 + rows * panel
        figure = new_figure(width, height)
        for row in range(rows):
            part = slice(row * across, (row + 1) * across)
            axes = place(figure, 0.55, height - 0.5 - (row + 1) * panel + below, width - 0.7, 1.35)
            _bars(axes, labels[part], kinds[part], bits[part], across)
        _title(figure, "Bits by layer")
        patches = [
            Patch(fc=colour, hatch=KIND_HATCHES.get(kind), ec="white", lw=0, label=kind)
            for kind, colour in KIND_COLOURS.items()
            if kind in kinds
        ]
        _legend(figure, 1 - 0.28 / height, loc="upper left", handles=patches)
    return figure


def _bars(
    axes: Axes, labels: Sequence[str], kinds: Sequence[str], bits: Sequence[float], across: int
) -> None:
    for x, (kind, height) in enumerate(zip(kinds, bits, strict=True)):
        axes.bar(
            x,
            height,
            0.78,
            color=KIND_COLOURS.get(kind, GREY),
            hatch=KIND_HATCHES.get(kind),
            ec="white",
            lw=0,
        )
        axes.text(x, height + 0.15, f"{height:.3g}", ha="center", va="bottom", fontsize=5.5)
    axes.set_xlim(-0.7, max(across, 5) - 0.3)
    axes.set_ylim(0, MAX_BITS + 1)
    axes.set_yticks(range(0, MAX_BITS + 1, 2))
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_ylabel("bits")
    axes.grid(axis="y")


def bits_over_time_figure(
    steps: Sequence[int],
    names: Sequence[str],
    bits: np.ndarray,
    average: Sequence[float],
    target: float | None = None,
) -> Figure:
    """Stored bits a weight as a line over a map of each layer's bits by step; `bits` [steps, layers] (Fig. 4)."""
    bits = np.asarray(bits, float)
    with settings():
        labels = [shorten(name.removesuffix(".weight"), 30) for name in names]
        left, line = (
            max(0.65, 0.25 + 0.052 * max(map(len, labels), default=0)),
            max(0.12, min(0.3, 2.4 / len(labels))),
        )
        width, map_height = left + 5.0, line * len(labels)
        height = map_height + 2.6
        figure = new_figure(width, height)
        top = place(figure, left, height - 1.45, width - left - 0.9, 1.05)
        top.plot(steps, average, color=BLUE, lw=1.3, drawstyle="steps-post")
        if target is not None:
            top.axhline(target, color=VERMILLION, lw=1, ls="--")
            top.annotate(
                f"target {target:g}", (1.01, target), color=VERMILLION, fontsize=7, va="center",
                xycoords=top.get_yaxis_transform(), annotation_clip=False,
            )  # fmt: skip
        top.set_ylabel("stored bits\na weight")
        top.set_ylim(
            0, max([MAX_BITS, target or 0, *average]) + 0.5
        )  # with the tables, small tensors have more
        top.grid()
        top.tick_params(labelbottom=False)
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
            axes.text(
                1.01,
                row + 0.5,
                f"{last:.3g}",
                fontsize=6,
                va="center",
                transform=axes.get_yaxis_transform(),
            )
        axes.set_xlabel("step")
        bar = figure.colorbar(
            mesh,
            cax=place(figure, left, 0.3, 2.6, 0.1),
            orientation="horizontal",
            ticks=range(1, 9),
        )
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        write(figure, left + 2.75, 0.35, "bits of a layer")
        write(figure, width - 0.84, 0.95 + map_height + 0.08, "last", size=6)
        _title(figure, "Bits over time")
    return figure


def error_over_time_figure(
    steps: Sequence[int], errors: Mapping[str, Sequence[float]], named: int = 5
) -> Figure:
    """Relative quantization error by layer: the largest at the end by name, the others grey with their median (Fig. 5a)."""
    with settings():
        figure = new_figure(6.4, 4.1)
        names = list(errors)
        table = np.array([np.asarray(errors[name], float) for name in names])
        table = np.where(table > 0, table, np.nan)  # no error at all has no place on a log axis
        order = np.argsort(-np.nan_to_num(table[:, -1]), kind="stable")
        largest, others = order[:named], order[named:]
        floor = 0.62 + 0.165 * -(-(len(largest) + 2 * bool(len(others))) // 2)
        axes = place(figure, 0.75, floor, 5.45, 3.65 - floor)
        axes.plot(steps, table[others].T, color=GREY, lw=0.6, alpha=0.6)
        for k, layer in enumerate(largest):
            label = shorten(names[layer].removesuffix(".weight"), 34)
            axes.plot(
                steps, table[layer], color=CYCLE[k % 6], ls=DASHES[k % 5], lw=1.3, label=label
            )
        if len(others):
            axes.plot(
                steps, np.nanmedian(table, axis=0), color=INK, lw=1.8, label="median of all layers"
            )
            axes.plot([], [], color=GREY, lw=0.6, label=f"the {len(others)} other layers")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("step")
        axes.set_ylabel("relative error |q - w|² / |w|² (log)")
        axes.grid()
        _legend(figure, 0, loc="lower left", ncols=2, handlelength=3)
        _title(figure, "Quantization error over time")
    return figure


def levels_over_time_figure(
    name: str,
    steps: Sequence[int],
    levels: Sequence[Sequence[float]],
    edges: np.ndarray,
    counts: np.ndarray,
) -> Figure:
    """One layer's levels by step beside the histogram of its weights (Fig. 5b). Their number may change on the way."""
    with settings():
        figure = new_figure(5.6, 3.4)
        axes = place(figure, 0.75, 0.55, 3.3, 2.25)
        firsts = [
            0,
            *(k for k in range(1, len(levels)) if len(levels[k]) != len(levels[k - 1])),
            len(levels),
        ]
        for first, end in pairwise(firsts):
            part = np.array(levels[first:end], float)
            for k, series in enumerate(part.T):
                axes.plot(steps[first:end], series, color=(BLUE, SKY)[k % 2], lw=1.1 if part.shape[1] <= 16 else 0.6,
                          marker="." if end - first == 1 else None, ms=3)  # fmt: skip
            if first:
                axes.axvline(steps[first], color=GREY, lw=0.7, ls=":")
        axes.set_xlabel("step")
        axes.set_ylabel("level")
        axes.grid()
        beside = place(figure, 4.25, 0.55, 1.2, 2.25, sharey=axes)
        beside.stairs(
            counts, edges, orientation="horizontal", fill=True, color=BLUE, alpha=0.45, lw=0
        )
        beside.hlines(
            levels[-1],
            0,
            1,
            transform=beside.get_yaxis_transform(),
            color=VERMILLION,
            lw=0.7,
            alpha=0.7,
        )
        beside.tick_params(labelleft=False, left=False)
        beside.xaxis.set_major_locator(MaxNLocator(2))
        beside.set_xlim(0)
        beside.set_xlabel("weights per bin")
        beside.set_title("last levels", fontsize=7, color=VERMILLION)
        _title(figure, f"Levels over time: {shorten(name, 42)}")
    return figure


def loss_over_time_figure(
    steps: Sequence[float], loss: Sequence[float], accuracy: Sequence[float]
) -> Figure:
    """Training loss over accuracy on the training batches (percent), by step."""
    with settings():
        figure = new_figure(6.4, 3.9)
        top = place(figure, 0.75, 1.95, 5.45, 1.5)
        top.plot(steps, loss, color=BLUE, lw=1.2)
        top.set_ylabel("loss")
        top.set_ylim(bottom=0)
        top.tick_params(labelbottom=False)
        axes = place(figure, 0.75, 0.55, 5.45, 1.15, sharex=top)
        axes.plot(steps, accuracy, color=VERMILLION, lw=1.2)
        axes.set_ylabel("training\naccuracy, %")
        axes.set_ylim(max(0, min(accuracy) - 2), 100.5)
        axes.set_xlabel("step")
        for each in (top, axes):
            each.grid()
            each.yaxis.set_major_locator(MaxNLocator(5))
        _title(figure, "Loss over time")
    return figure


def size_against_accuracy_figure(
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    stored: tuple[float, float] | None = None,
) -> Figure:
    """A sweep's accuracy (a share) over size: series of (bytes, accuracy, label); `stored` is the float model's pair."""
    with settings():
        figure = new_figure(6.4, 4.0)
        axes = place(figure, 0.75, 0.8, 5.4, 2.75)
        sizes = [point[0] for points in series.values() for point in points]
        factor, unit = (1e6, "MB") if min(sizes) >= 1e6 else (1e3, "kB")
        if stored:
            axes.axhline(100 * stored[1], color=GREY, lw=1, ls="--")
            axes.plot(
                stored[0] / factor, 100 * stored[1], "*", color=INK, ms=9, label="float model"
            )
        for k, (name, points) in enumerate(series.items()):
            _curve(
                axes,
                name,
                [(size / factor, 100 * share, text) for size, share, text in sorted(points)],
                k,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(0.1, 0.15)
        axes.set_xlabel(f"size of all tensors, {unit} (log)")
        axes.set_ylabel("accuracy, %")
        axes.grid()
        _legend(figure, 0, loc="lower left")
        _title(figure, "Size against accuracy")
    return figure


def _curve(axes: Axes, name: str, points: Sequence[tuple[float, float, str]], k: int) -> None:
    """One series; its labels stand above left or, every other series, below right, where rising curves leave room."""
    colour, above = CYCLE[k % 6], k % 2 == 0
    x, y, labels = zip(*points, strict=True)
    axes.plot(x, y, color=colour, marker="osD^vP"[k % 6], ms=5, lw=1.2, label=name)
    halo = [Stroke(linewidth=2, foreground=PAPER), Normal()]
    for at, label in zip(zip(x, y, strict=True), labels, strict=True):
        axes.annotate(
            label, at, (-3, 5) if above else (4, -5), textcoords="offset points", fontsize=6.5, color=colour,
            ha="right" if above else "left", va="bottom" if above else "top", path_effects=halo,
        )  # fmt: skip


def _legend(figure: Figure, y: float, **kwargs: Any) -> None:
    figure.legend(
        bbox_to_anchor=(0.12 / figure.get_figwidth(), y),
        borderaxespad=0.4,
        borderpad=0,
        **{"ncols": 4, **kwargs},
    )


def _title(figure: Figure, text: str) -> None:
    write(figure, 0.12, figure.get_figheight() - 0.2, text, size=11, bold=True)


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Step boundaries for a map: each column reaches to the next step, the last as far as the one before."""
    steps_ = np.asarray(steps, float)
    last = steps_[-1] - steps_[-2] if len(steps_) > 1 else 1.0
    return np.append(steps_, steps_[-1] + last)
