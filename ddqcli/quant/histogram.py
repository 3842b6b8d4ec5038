"""Histogram of a tensor, and the squared error that levels leave on it. Needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CHUNK = 1 << 18  # values binned at a time: the intermediate arrays stay in the processor's cache


@dataclass(frozen=True)
class Histogram:
    """Equal bins over [low, high], with the number and the sum of the values in each.

    Histograms add up with `+`. Over different ranges, bins move as a whole to where their mean is.

    Attributes:
        low, high: the range.
        count: [bins] number of values.
        total: [bins] sum of the values.
        square: sum of all squared values.
    """

    low: float
    high: float
    count: Array
    total: Array
    square: float

    @classmethod
    def of(
        cls,
        values: NDArray[np.floating],
        bins: int = 4096,
        low: float | None = None,
        high: float | None = None,
    ) -> Histogram:
        """Summarize finite `values` of any shape.

        The range is their own unless given; values outside a given range count in its outer bins.
        """
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        low = float(flat.min()) if low is None else low
        high = float(flat.max()) if high is None else high
        extent = high - low
        # Single precision suffices for binning unless it would over- or underflow in this range.
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
        low, high = min(self.low, other.low), max(self.high, other.high)
        a, b = self.over(low, high), other.over(low, high)
        return Histogram(
            low, high, a.count + b.count, a.total + b.total, self.square + other.square
        )

    def over(self, low: float, high: float) -> Histogram:
        """Return the histogram over a range that contains its own."""
        if (low, high) == (self.low, self.high):
            return self
        mean, count, total = self.points()
        bins = len(self.count)
        index = np.clip((mean - low) / (high - low) * bins, 0, bins - 1).astype(np.intp)
        counts = np.bincount(index, weights=count, minlength=bins).astype(np.float64)
        totals = np.bincount(index, weights=total, minlength=bins).astype(np.float64)
        return Histogram(low, high, counts, totals, self.square)

    def scaled(self, factor: float) -> Histogram:
        """Return the histogram of values that are `factor` times as many."""
        parts = factor * self.count, factor * self.total
        return Histogram(self.low, self.high, *parts, factor * self.square)

    def points(self) -> tuple[Array, Array, Array]:
        """Mean, count and sum of each non-empty bin, ascending."""
        full = self.count > 0
        return self.total[full] / self.count[full], self.count[full], self.total[full]

    @cached_property
    def running(self) -> tuple[Array, Array, Array]:
        """Means [P] of the non-empty bins, and running counts and sums [P + 1], 0 first."""
        mean, count, total = self.points()
        return mean, np.append(0.0, np.cumsum(count)), np.append(0.0, np.cumsum(total))


def squared_error(distribution: Histogram, levels: Array) -> float:
    """Sum of (x - nearest level)^2 over all values, exact except in bins that hold a threshold.

    The levels may be in any order.
    """
    return float(squared_errors(distribution, np.sort(levels)[None])[0])


def squared_errors(distribution: Histogram, candidates: Array) -> Array:
    """`squared_error` of each row of ascending levels, [K, n] -> [K]."""
    mean, counts, sums = distribution.running
    edges = np.searchsorted(mean, (candidates[:, 1:] + candidates[:, :-1]) / 2)
    edges = np.pad(edges, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(mean))))
    count, total = np.diff(counts[edges]), np.diff(sums[edges])
    # The sum of x^2 - 2qx + q^2, level by level.
    error: Array = distribution.square + (candidates * (candidates * count - 2 * total)).sum(1)
    return np.maximum(error, 0.0)
