"""The shape of a distribution in the paper's words (Fig. 1), by rules on its histogram; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddqcli.quant.histogram import Array, Histogram

GAUSSIAN_RATIO = 3.8194  # (q99.5 - q0.5) / (q75 - q25) of a Gaussian
HEAVY = 1.4  # tail weight from which on tails are heavy: a Laplace has 1.74, Student's t with 5 degrees 1.45
FLAT = 0.7  # and up to which they are missing: a uniform distribution has 0.52
FEWEST = 64  # values below which no shape can be told

DIP_DEPTH = 0.75  # a dip falls to this share of the lower peak beside it,
DIP_HEIGHT = 0.1  # that peak has at least this share of the highest one's density,
DIP_ERRORS = 3.5  # and the fall is this many standard errors of the smoothed density


@dataclass(frozen=True)
class Shape:
    """What one distribution looks like."""

    mean: float
    std: float
    tail_weight: float  # reach of the outer 1 % over that of the inner half, as a multiple of a Gaussian's; 0: constant
    word: str  # Gaussian-like, heavy-tailed, multi-peaked, flat, constant, or too few


def shape_of(distribution: Histogram) -> Shape:
    """Describe a distribution of finite values. 64 values tell two peaks 6 standard deviations apart, 300 tell 4."""
    size = distribution.count.sum()
    mean = float(distribution.total.sum() / size)
    std = float(np.sqrt(max(0.0, distribution.square / size - mean**2)))
    if distribution.low == distribution.high:
        return Shape(mean, 0.0, 0.0, "constant")
    outer_low, inner_low, inner_high, outer_high = quantiles(
        distribution, np.array([0.005, 0.25, 0.75, 0.995])
    )
    inner = inner_high - inner_low
    tail_weight = (
        float(min((outer_high - outer_low) / (inner * GAUSSIAN_RATIO), 1000.0))
        if inner > 0
        else 1000.0
    )
    if size < FEWEST:
        word = "too few"
    elif has_dip(distribution, min(std, inner / 1.349) or std):
        word = "multi-peaked"
    else:
        word = (
            "heavy-tailed"
            if tail_weight >= HEAVY
            else "flat"
            if tail_weight <= FLAT
            else "Gaussian-like"
        )
    return Shape(mean, std, tail_weight, word)


def quantiles(distribution: Histogram, shares: Array) -> Array:
    """The values below which `shares` of the distribution lie, interpolated between its points' middle ranks."""
    mean, counted, _ = distribution.running
    found: Array = np.interp(shares * counted[-1], (counted[1:] + counted[:-1]) / 2, mean)
    return found


def has_dip(distribution: Histogram, spread: float) -> bool:
    """Whether the density falls between two peaks: deeply, between peaks that matter, and beyond what chance does.

    The density is smoothed by a Gaussian of 0.54 spread n^(-1/5): 0.6 of Silverman's rule, which would close true dips.
    """
    count, bins = distribution.count, len(distribution.count)
    size, width = count.sum(), (distribution.high - distribution.low) / len(distribution.count)
    bandwidth = max(0.54 * spread * size**-0.2, 0.05 * spread, width)
    kernel = np.exp(-2 * (np.pi * np.fft.rfftfreq(2 * bins) * bandwidth / width) ** 2)
    density = np.fft.irfft(np.fft.rfft(count, 2 * bins) * kernel, 2 * bins)[:bins] / (size * width)
    left, right = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
    peak = np.minimum(left, right)  # the lower of the highest peaks on either side
    error = np.sqrt((peak + np.maximum(density, 0)) / (2 * np.sqrt(np.pi) * size * bandwidth))
    matters = peak >= DIP_HEIGHT * density.max()
    return bool(
        np.any(matters & (density <= DIP_DEPTH * peak) & (peak - density >= DIP_ERRORS * error))
    )
