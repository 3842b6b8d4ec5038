"""A tensor summarized as a histogram, and the squared error that levels leave on it. Needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CHUNK = (
    1 << 18
)  # values binned at a time, so that the intermediate arrays stay in the processor's cache


@dataclass(frozen=True)
class Histogram:
    """A histogram with equal bins over [low, high]: per bin the number of values and their sum; over all, the squares.

    Two distributions over the same range and bins add up with `+`.
    """

    low: float
    high: float
    count: Array  # [bins]
    total: Array  # [bins], sum of the values in the bin
    square: float  # sum of the squared values

    @classmethod
    def of(
        cls,
        values: NDArray[np.floating],
        bins: int = 4096,
        low: float | None = None,
        high: float | None = None,
    ) -> Histogram:
        """Summarise finite `values` of any shape, in [low, high] (their own range unless given)."""
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        low = float(flat.min()) if low is None else low
        high = float(flat.max()) if high is None else high
        extent = high - low
        # Single precision is exact enough to bin by, unless the range is so small or large that it over- or underflows.
        working = np.float32 if 1e-30 < extent < 1e30 else np.float64
        per_bin = bins / extent if extent > 0 else 0.0
        count, total, square = np.zeros(bins), np.zeros(bins), 0.0
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            position = np.subtract(part, low, dtype=working)
            position *= working(per_bin)
            index = np.clip(position, 0, bins - 1, out=position).astype(np.intp)
            exact = part.astype(np.float64)
            count += np.bincount(index, minlength=bins)
            total += np.bincount(index, weights=exact, minlength=bins)
            square += float(np.dot(exact, exact))
        return cls(low, high, count, total, square)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(
            self.low,
            self.high,
            self.count + other.count,
            self.total + other.total,
            self.square + other.square,
        )

    def points(self) -> tuple[Array, Array, Array]:
        """Mean, count and sum of each bin that holds a value, ascending."""
        full = self.count > 0
        return self.total[full] / self.count[full], self.count[full], self.total[full]

    @cached_property
    def running(self) -> tuple[Array, Array, Array]:
        """The points' means [P], and count and sum of all values before each point and at the end, [P + 1] each."""
        mean, count, total = self.points()
        return (
            mean,
            np.concatenate([[0.0], np.cumsum(count)]),
            np.concatenate([[0.0], np.cumsum(total)]),
        )


def squared_error(distribution: Histogram, levels: Array) -> float:
    """Sum of (x - nearest level)^2 over all values; exact but for bins that straddle a threshold."""
    return float(squared_errors(distribution, np.sort(levels)[None])[0])


def squared_errors(distribution: Histogram, candidates: Array) -> Array:
    """`squared_error` of each row of ascending levels, [K, n] -> [K]."""
    mean, counted, summed = distribution.running
    edges = np.searchsorted(mean, (candidates[:, 1:] + candidates[:, :-1]) / 2)
    edges = np.pad(edges, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(mean))))
    count, total = np.diff(counted[edges]), np.diff(summed[edges])
    # Summed per level about the level itself: x^2 - 2qx + q^2.
    error: Array = distribution.square + (candidates * (candidates * count - 2 * total)).sum(1)
    return np.maximum(error, 0.0)
