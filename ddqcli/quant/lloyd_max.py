"""Lloyd-Max levels: 1-D k-means (Lloyd 1982, Max 1960). Needs numpy only."""

from __future__ import annotations

import numpy as np

from ddqcli.quant.histogram import Array, Histogram, squared_error


def lloyd_max(
    distribution: Histogram, n: int, start: Array | None = None, iterations: int = 50
) -> Array:
    """Return n ascending levels of least squared error. A level without members stays in place.

    Without `start` [n], the better of two results is returned. One starts from levels spread evenly
    over density^(1/3), which suits many values; the other from greedy splitting, which suits few
    values and far outliers.
    """
    mean, _, _ = distribution.running
    if len(mean) <= n:
        return np.concatenate([mean, np.full(n - len(mean), mean[-1])])
    if start is not None:
        return _iterate(distribution, np.sort(start), iterations)
    starts = _compand(distribution, n), _split(distribution, n)
    fits = [_iterate(distribution, levels, iterations) for levels in starts]
    return min(fits, key=lambda levels: squared_error(distribution, levels))


def _iterate(distribution: Histogram, levels: Array, iterations: int) -> Array:
    """Lloyd's iteration: assign values to the nearest level, move levels to their means."""
    mean, counts, sums = distribution.running
    for _ in range(iterations):
        thresholds = np.searchsorted(mean, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], thresholds, [len(mean)]])
        members = np.diff(counts[edges])
        centroids = np.where(members > 0, np.diff(sums[edges]) / np.maximum(members, 1), levels)
        if np.array_equal(centroids, levels):
            break
        levels = np.sort(centroids)
    return levels


def _compand(distribution: Histogram, n: int) -> Array:
    """Panter and Dite's start (1951): even steps in the integral of the density's cube root."""
    bins, density = len(distribution.count), distribution.count
    if bins >= 64:
        density = np.convolve(density, np.ones(9) / 9, mode="same")
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    edges = np.linspace(distribution.low, distribution.high, bins + 1)
    levels: Array = np.interp((np.arange(n) + 0.5) / n * mass[-1], mass, edges)
    return levels


def _split(distribution: Histogram, n: int) -> Array:
    """Means of n clusters. Starting from one, split those whose split reduces the error most."""
    mean, counts, sums = distribution.running
    edges = np.array([0, len(mean)])
    while len(edges) <= n:
        sizes = np.diff(edges)
        first, last = np.repeat(edges[:-1], sizes), np.repeat(edges[1:], sizes)
        # Error reduction of a cut before each point, from the two parts' counts and means.
        left, right = counts[:-1] - counts[first], counts[last] - counts[:-1]
        left_mean = (sums[:-1] - sums[first]) / np.maximum(left, 1)
        right_mean = (sums[last] - sums[:-1]) / right
        gain = left * right / (left + right) * np.square(left_mean - right_mean)
        best = np.maximum.reduceat(gain, edges[:-1])
        # Several clusters per round: all within half the largest gain, as far as levels remain.
        chosen = np.argsort(-best, kind="stable")[: n + 1 - len(edges)]
        chosen = chosen[best[chosen] > best[chosen[0]] / 2]
        if len(chosen) == 0:  # nothing left to gain but rounding errors
            break
        cuts = [edges[c] + int(np.argmax(gain[edges[c] : edges[c + 1]])) for c in chosen]
        edges = np.sort(np.concatenate([edges, cuts]))
    levels: Array = np.diff(sums[edges]) / np.diff(counts[edges])
    return np.concatenate([levels, np.full(n - len(levels), levels[-1])])
