"""Levels of least squared error: 1-D k-means (Lloyd 1982, Max 1960). Needs numpy only."""

from __future__ import annotations

import numpy as np

from ddqcli.quant.histogram import Array, Histogram, squared_error


def lloyd_max(
    distribution: Histogram, n: int, start: Array | None = None, iterations: int = 50
) -> Array:
    """n ascending levels of least squared error: 1-D k-means (Lloyd 1982, Max 1960). Levels without members stay.

    Started at `start` [n], or else at two guesses of which the better result is kept: an even spread of density^(1/3),
    which is right for many values, and greedy splitting, which is right for few values and for far outliers.
    """
    mean, _, _ = distribution.running
    if len(mean) <= n:
        return np.concatenate([mean, np.full(n - len(mean), mean[-1])])
    if start is not None:
        return _lloyd(distribution, np.sort(start), iterations)
    fits = [
        _lloyd(distribution, guess(distribution, n), iterations) for guess in (_companded, _split)
    ]
    return min(fits, key=lambda levels: squared_error(distribution, levels))


def _lloyd(distribution: Histogram, levels: Array, iterations: int) -> Array:
    mean, counted, summed = distribution.running
    for _ in range(iterations):
        edges = np.concatenate(
            [[0], np.searchsorted(mean, (levels[1:] + levels[:-1]) / 2), [len(mean)]]
        )
        members = np.diff(counted[edges])
        centroids = np.where(members > 0, np.diff(summed[edges]) / np.maximum(members, 1), levels)
        if np.array_equal(centroids, levels):
            break
        levels = np.sort(centroids)
    return levels


def _companded(distribution: Histogram, n: int) -> Array:
    """Panter and Dite's start: levels spread evenly over the integral of the cube root of the density."""
    bins = len(distribution.count)
    smooth = (
        np.convolve(distribution.count, np.ones(9) / 9, mode="same")
        if bins >= 64
        else distribution.count
    )
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(smooth))])
    edges = np.linspace(distribution.low, distribution.high, bins + 1)
    levels: Array = np.interp((np.arange(n) + 0.5) / n * mass[-1], mass, edges)
    return levels


def _split(distribution: Histogram, n: int) -> Array:
    """One cluster split again and again where that takes off most error, several at a time; the clusters' means."""
    mean, counted, summed = distribution.running
    edges = np.array([0, len(mean)])
    while len(edges) <= n:
        sizes = np.diff(edges)
        first, last = np.repeat(edges[:-1], sizes), np.repeat(edges[1:], sizes)
        left, right = (
            counted[:-1] - counted[first],
            counted[last] - counted[:-1],
        )  # values before a point; from it on
        means = (
            (summed[:-1] - summed[first]) / np.maximum(left, 1),
            (summed[last] - summed[:-1]) / right,
        )
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
