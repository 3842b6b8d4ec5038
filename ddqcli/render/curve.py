"""A curve of points in plain characters, for a terminal or a pipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float, str]  # x > 0, y, label

_HEIGHT, _WIDTH = 10, 60  # rows and columns of the field


def curve_lines(points: Sequence[Point], reference: float, ticks: Sequence[str]) -> list[str]:
    """Return the lines of a picture of points over a logarithmic x axis.

    A dashed line shows the `reference`. `ticks` are the texts of the largest y, the smallest y, the
    smallest x and the largest x, the reference included.
    """
    high, low = (each([reference, *(y for _, y, _ in points)]) for each in (max, min))
    left, right = (math.log(each(x for x, _, _ in points)) for each in (min, max))

    def row_of(y: float) -> int:
        return round((high - y) / (high - low) * (_HEIGHT - 1)) if high > low else _HEIGHT // 2

    def column_of(x: float) -> int:
        share = (math.log(x) - left) / (right - left) if right > left else 0.5
        return round(share * (_WIDTH - 10))  # leaves room for a label

    field = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    field[row_of(reference)][::2] = "-" * len(range(0, _WIDTH, 2))
    for x, y, label in sorted(points):
        row, column = field[row_of(y)], column_of(x)
        text = f"o {label} "[: _WIDTH - column]
        row[column : column + len(text)] = text
    top, bottom, first, last = ticks
    width = max(len(top), len(bottom))
    margins = {row_of(low): bottom, row_of(high): top}
    lines = [f"{margins.get(k, ''):>{width}} |{''.join(row)}" for k, row in enumerate(field)]
    axis = [f"{'':>{width}} +{'-' * _WIDTH}", f"{'':>{width}}  {first:<{_WIDTH - 10}}{last}"]
    return [line.rstrip() for line in [*lines, *axis]]
