"""Size against accuracy: the result of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ddqcli.plots.layout import (
    HEIGHT,
    WIDTH,
    add_axes,
    add_legend,
    add_title,
    limit_shares,
    new_figure,
)
from ddqcli.plots.style import CYCLE, GRAY, INK, settings

Point = tuple[float, float, str]  # size, value, label


def size_against_accuracy_figure(
    series: Mapping[str, Sequence[Point]],
    stored: tuple[float, float] | None = None,
    metric: str = "accuracy, %",
    this: str | None = None,
) -> Figure:
    """Draw the accuracy of each series, or another metric, over the size of the file.

    Each point is (bytes, value, label). `stored` is the float model's size and value, `metric` the
    name and unit of values. A ring marks the points with the label `this`.
    """
    with settings():
        figure = new_figure(WIDTH, HEIGHT)
        axes = add_axes(figure, 0.68, 0.82, WIDTH - 0.85, HEIGHT - 1.3)
        points = [point for points in series.values() for point in points]
        factor, unit = (1e6, "MB") if min(point[0] for point in points) >= 1e6 else (1e3, "kB")
        if stored:
            size, value = stored[0] / factor, stored[1]
            axes.plot(size, value, "*", color=INK, ms=9, label="float model", clip_on=False)
            axes.axhline(value, color=GRAY, lw=1, ls="--", label=f"its {metric.partition(',')[0]}")
        for k, (name, of_series) in enumerate(series.items()):
            scaled = [(size / factor, value, label) for size, value, label in sorted(of_series)]
            _draw_series(axes, name, scaled, k, alternate=len(series) == 1)
        if marked := [(size / factor, value) for size, value, label in points if label == this]:
            x, y = zip(*marked, strict=True)
            ring: Any = {"mfc": "none", "mec": INK, "ms": 11, "clip_on": False}
            axes.plot(x, y, "o", label="this run", **ring)
        axes.set_xscale("log")
        sizes = [point[0] for point in points] + ([stored[0]] if stored else [])
        close = max(sizes) < 8 * min(sizes)  # then 1, 2, 5 would be few ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if close else (1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(0.1, 0.15)
        axes.set_xlabel(f"size of the file, {unit} (log)")
        limit_shares(axes, [point[1] for point in points] + ([stored[1]] if stored else []), metric)
        axes.grid()
        add_legend(figure, 0, loc="lower left")
        add_title(figure, f"Size against {metric.partition(',')[0]}")
    return figure


def _draw_series(
    axes: Axes, name: str, points: Sequence[Point], k: int, *, alternate: bool
) -> None:
    """Draw the k-th series.

    Labels stand above or, for every other series, below the points; of an only series they
    alternate.
    """
    color = CYCLE[k % 6]
    x, y, labels = zip(*points, strict=True)
    style: Any = {"color": color, "marker": "osD^vP"[k % 6], "ms": 5, "lw": 1.2, "clip_on": False}
    axes.plot(x, y, label=name, **style)
    for j, label in enumerate(labels):
        below = (k + alternate * (j + 1)) % 2 == 1
        side = _free_side(y, j, -1 if below else 1)
        if side is None:  # a peak or a valley
            below, side = not below, "center"
        axes.annotate(
            label,
            (x[j], y[j]),
            ({"right": -3, "center": 0, "left": 3}[side], -6 if below else 6),
            textcoords="offset points",
            fontsize=6.5,
            color=INK if alternate else color,
            ha=side,
            va="top" if below else "bottom",
        )


def _free_side(y: Sequence[float], j: int, sign: int) -> Literal["left", "center", "right"] | None:
    """Return the alignment that keeps the label of point j off the lines to its neighbors.

    None if both are in the way. `sign` is 1 above the point and -1 below it.
    """
    before, after = (0 <= n < len(y) and sign * (y[n] - y[j]) > 0 for n in (j - 1, j + 1))
    if before and after:
        return None
    return "right" if after else "left" if before else "center"
