"""The shape of a distribution in the paper's words (Fig. 1), by rules on its histogram.

Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddqcli.quant.histogram import Array, Histogram

GAUSSIAN_RATIO = 3.8194  # (q99.5 - q0.5) / (q75 - q25) of a Gaussian
HEAVY = 1.4  # least tail weight of heavy tails: Laplace has 1.74, Student's t of 5 degrees 1.45
FLAT = 0.7  # largest tail weight of a flat distribution: uniform has 0.52
MIN_VALUES = 64  # of fewer, no shape can be told

# A dip separates two peaks if
DIP_DEPTH = 0.75  # the density falls to at most this share of the lower peak,
DIP_HEIGHT = 0.1  # the lower peak has at least this share of the highest density,
DIP_ERRORS = 3.5  # and the fall is at least this many standard errors of the smoothed density.


@dataclass(frozen=True)
class Shape:
    """Statistics of a distribution, and a word for its shape."""

    mean: float
    std: float
    tail_weight: float  # range of the central 99 % over that of the central half; Gaussian: 1
    word: str  # Gaussian-like, heavy-tailed, multi-peaked, flat, constant, or too few


def shape_of(histogram: Histogram) -> Shape:
    """Describe a histogram of finite values.

    Two peaks 6 standard deviations apart are told apart from 64 values on, 4 apart from 300 on.
    """
    size = histogram.count.sum()
    mean = float(histogram.total.sum() / size)
    std = float(np.sqrt(max(0.0, histogram.square / size - mean**2)))
    if histogram.low == histogram.high:
        return Shape(mean, 0.0, 0.0, "constant")
    outer_low, inner_low, inner_high, outer_high = quantiles(
        histogram, np.array([0.005, 0.25, 0.75, 0.995])
    )
    inner = inner_high - inner_low
    tail_weight = 1000.0
    if inner > 0:
        tail_weight = float(min((outer_high - outer_low) / (inner * GAUSSIAN_RATIO), tail_weight))
    if size < MIN_VALUES:
        word = "too few"
    elif has_dip(histogram, min(std, inner / 1.349) or std):
        word = "multi-peaked"
    elif tail_weight >= HEAVY:
        word = "heavy-tailed"
    else:
        word = "flat" if tail_weight <= FLAT else "Gaussian-like"
    return Shape(mean, std, tail_weight, word)


def quantiles(histogram: Histogram, shares: Array) -> Array:
    """Return the values below which `shares` of the values lie, by linear interpolation."""
    mean, counted, _ = histogram.running
    middle_ranks = (counted[1:] + counted[:-1]) / 2
    values: Array = np.interp(shares * counted[-1], middle_ranks, mean)
    return values


def has_dip(histogram: Histogram, spread: float) -> bool:
    """True if the density falls between two peaks, by DIP_DEPTH, DIP_HEIGHT and DIP_ERRORS.

    The density is smoothed by a Gaussian of 0.54 spread n^(-1/5), which is 0.6 of Silverman's rule;
    his bandwidth would close real dips.
    """
    count, bins = histogram.count, len(histogram.count)
    size, width = count.sum(), (histogram.high - histogram.low) / bins
    bandwidth = max(0.54 * spread * size**-0.2, 0.05 * spread, width)
    kernel = np.exp(-2 * (np.pi * np.fft.rfftfreq(2 * bins) * bandwidth / width) ** 2)
    density = np.fft.irfft(np.fft.rfft(count, 2 * bins) * kernel, 2 * bins)[:bins] / (size * width)
    left, right = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
    peak = np.minimum(left, right)  # the lower of the highest peaks on either side
    error = np.sqrt((peak + np.maximum(density, 0)) / (2 * np.sqrt(np.pi) * size * bandwidth))
    deep = (density <= DIP_DEPTH * peak) & (peak - density >= DIP_ERRORS * error)
    return bool(np.any(deep & (peak >= DIP_HEIGHT * density.max())))
