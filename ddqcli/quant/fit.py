"""Levels fitted to a distribution of values, and the error they leave; numpy only.

A tensor is summarised once as a histogram that also keeps each bin's sum, so that fitting levels for every bit-width
costs milliseconds whatever the tensor's size. Used to start levels, to weigh the closing of a gate, and to inspect.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CHUNK = 1 << 18  # values binned at a time, so that the intermediate arrays stay in the processor's cache


@dataclass(frozen=True)
class Distribution:
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
        cls, values: NDArray[np.floating], bins: int = 4096, low: float | None = None, high: float | None = None
    ) -> Distribution:
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

    def __add__(self, other: Distribution) -> Distribution:
        return Distribution(
            self.low, self.high, self.count + other.count, self.total + other.total, self.square + other.square
        )

    def points(self) -> tuple[Array, Array, Array]:
        """Mean, count and sum of each bin that holds a value, ascending."""
        full = self.count > 0
        return self.total[full] / self.count[full], self.count[full], self.total[full]

    @cached_property
    def running(self) -> tuple[Array, Array, Array]:
        """The points' means [P], and count and sum of all values before each point and at the end, [P + 1] each."""
        mean, count, total = self.points()
        return mean, np.concatenate([[0.0], np.cumsum(count)]), np.concatenate([[0.0], np.cumsum(total)])


def squared_error(distribution: Distribution, levels: Array) -> float:
    """Sum of (x - nearest level)^2 over all values; exact but for bins that straddle a threshold."""
    return float(_squared_errors(distribution, np.sort(levels)[None])[0])


def _squared_errors(distribution: Distribution, candidates: Array) -> Array:
    """`squared_error` of each row of ascending levels, [K, n] -> [K]."""
    mean, counted, summed = distribution.running
    edges = np.searchsorted(mean, (candidates[:, 1:] + candidates[:, :-1]) / 2)
    edges = np.pad(edges, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(mean))))
    count, total = np.diff(counted[edges]), np.diff(summed[edges])
    # Summed per level about the level itself: x^2 - 2qx + q^2.
    error: Array = distribution.square + (candidates * (candidates * count - 2 * total)).sum(1)
    return np.maximum(error, 0.0)


def lloyd_max(distribution: Distribution, n: int, start: Array | None = None, iterations: int = 50) -> Array:
    """n ascending levels of least squared error: 1-D k-means (Lloyd 1982, Max 1960). Levels without members stay.

    Started at `start` [n], or else at two guesses of which the better result is kept: an even spread of density^(1/3),
    which is right for many values, and greedy splitting, which is right for few values and for far outliers.
    """
    mean, _, _ = distribution.running
    if len(mean) <= n:
        return np.concatenate([mean, np.full(n - len(mean), mean[-1])])
    if start is not None:
        return _lloyd(distribution, np.sort(start), iterations)
    fits = [_lloyd(distribution, guess(distribution, n), iterations) for guess in (_companded, _split)]
    return min(fits, key=lambda levels: squared_error(distribution, levels))


def _lloyd(distribution: Distribution, levels: Array, iterations: int) -> Array:
    mean, counted, summed = distribution.running
    for _ in range(iterations):
        edges = np.concatenate([[0], np.searchsorted(mean, (levels[1:] + levels[:-1]) / 2), [len(mean)]])
        members = np.diff(counted[edges])
        centroids = np.where(members > 0, np.diff(summed[edges]) / np.maximum(members, 1), levels)
        if np.array_equal(centroids, levels):
            break
        levels = np.sort(centroids)
    return levels


def _companded(distribution: Distribution, n: int) -> Array:
    """Panter and Dite's start: levels spread evenly over the integral of the cube root of the density."""
    bins = len(distribution.count)
    smooth = np.convolve(distribution.count, np.ones(9) / 9, mode="same") if bins >= 64 else distribution.count
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(smooth))])
    edges = np.linspace(distribution.low, distribution.high, bins + 1)
    levels: Array = np.interp((np.arange(n) + 0.5) / n * mass[-1], mass, edges)
    return levels


def _split(distribution: Distribution, n: int) -> Array:
    """One cluster split again and again where that takes off most error, several at a time; the clusters' means."""
    mean, counted, summed = distribution.running
    edges = np.array([0, len(mean)])
    while len(edges) <= n:
        sizes = np.diff(edges)
        first, last = np.repeat(edges[:-1], sizes), np.repeat(edges[1:], sizes)
        left, right = counted[:-1] - counted[first], counted[last] - counted[:-1]  # values before a point; from it on
        means = (summed[:-1] - summed[first]) / np.maximum(left, 1), (summed[last] - summed[:-1]) / right
        gain = left * right / (left + right) * np.square(means[0] - means[1])
        best = np.maximum.reduceat(gain, edges[:-1])
        chosen = np.argsort(-best, kind="stable")[: n + 1 - len(edges)]
        chosen = chosen[best[chosen] > best[chosen[0]] / 2]
        if len(chosen) == 0:  # rounding left nothing to gain
            break
        cuts = [edges[c] + int(np.argmax(gain[edges[c] : edges[c + 1]])) for c in chosen]
        edges = np.sort(np.concatenate([edges, cuts]))
    levels: Array = np.diff(summed[edges]) / np.diff(counted[edges])
    return np.concatenate([levels, np.full(n - len(levels), levels[-1])])


def uniform_pattern(bits: int) -> Array:
    """Eqn (1) without c and the shift: 2^b levels from -1 to 1, with 0 twice so that there are 2^b."""
    positive = np.arange(2 ** (bits - 1)) / max(2 ** (bits - 1) - 1, 1) if bits > 1 else np.ones(1)
    return np.concatenate([-positive[::-1], positive])


def power_of_two_pattern(bits: int) -> Array:
    """Eqn (2) without c and the shift: 2^b levels from -2^-1 to 2^-1, each half the one before, with 0 twice."""
    half = 2 ** (bits - 1)
    positive = np.concatenate([[0.0], 2.0 ** -np.arange(half - 1, 0, -1.0)]) if bits > 1 else np.array([0.5])
    return np.concatenate([-positive[::-1], positive])


def scaled(distribution: Distribution, pattern: Array, candidates: int = 64) -> Array:
    """`pattern` times the clipping threshold c of least squared error.

    c is searched from the largest absolute value downward, each try 8 % below the last, then finely about the best.
    """
    reach = (
        max(abs(distribution.low), abs(distribution.high)) / pattern.max() or 2.0**-99
    )  # zeros only: next to nothing
    coarse = reach * 2.0 ** (-np.arange(candidates) / 8)
    best = coarse[int(np.argmin(_squared_errors(distribution, coarse[:, None] * pattern)))]
    fine = np.minimum(best * 2.0 ** (np.linspace(-1, 1, candidates + 1) / 8), reach)
    fitted: Array = pattern * fine[int(np.argmin(_squared_errors(distribution, fine[:, None] * pattern)))]
    return fitted
