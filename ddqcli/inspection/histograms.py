"""Histograms of stored tensors, read chunk by chunk, and the error of levels fitted to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddqcli.checkpoint.tensors import CheckpointTensor
from ddqcli.errors import CheckpointError
from ddqcli.quant.histogram import Array, Histogram, squared_error
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern, power_of_two_pattern, uniform_pattern

BINS = 1 << 14  # 256 levels fitted to so many bins err by at most 1 % more than exact ones
SHOWN_BINS = 128


def histogram_of(tensor: CheckpointTensor, path: Path) -> Histogram:
    """Return a tensor's histogram in BINS bins. Raises CheckpointError for NaN and infinity.

    The chunks are read twice, first for their range. `path` is named in errors.
    """
    low, high = value_range(tensor, path)
    parts = (Histogram.of(chunk, BINS, low, high) for chunk in tensor.chunks())
    whole = next(parts)
    for part in parts:
        whole = whole + part
    return whole


def value_range(tensor: CheckpointTensor, path: Path) -> tuple[float, float]:
    """Return the smallest and the largest value. Raises CheckpointError for NaN and infinity."""
    low, high = np.inf, -np.inf
    for chunk in tensor.chunks():
        bounds = float(chunk.min()), float(chunk.max())
        if not np.isfinite(bounds).all():  # NaN anywhere makes both bounds NaN
            raise CheckpointError(
                f"{path}: {tensor.name} holds NaN or infinite values; the training that saved it "
                "had diverged: take an earlier checkpoint."
            )
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return low, high


def shown_counts(histogram: Histogram) -> tuple[int, ...]:
    """Return the number of values in each of SHOWN_BINS equal bins."""
    return tuple(int(n) for n in histogram.count.reshape(SHOWN_BINS, -1).sum(1))


def fit_levels(histogram: Histogram, bits: int) -> dict[str, Array]:
    """Return the uniform, power-of-two and Lloyd-Max ("best") levels of least squared error."""
    return {
        "uniform": fit_pattern(histogram, uniform_pattern(bits)),
        "power_of_two": fit_pattern(histogram, power_of_two_pattern(bits)),
        "best": lloyd_max(histogram, 2**bits),
    }


def relative_errors(histogram: Histogram, levels: dict[str, Array]) -> dict[str, float]:
    """Return ||q - w||² / ||w||² of rounding to each of the level vectors."""
    total = histogram.square or 1.0  # a tensor of zeros has no error
    return {kind: squared_error(histogram, vector) / total for kind, vector in levels.items()}
