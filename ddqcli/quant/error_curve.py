"""Squared quantization error by bit-width, from which rules estimate the loss increase."""

from __future__ import annotations

import numpy as np

from ddqcli.quant.grid import GRID_STEPS, LEVEL_BITS, fit_grid
from ddqcli.quant.histogram import Histogram, squared_error
from ddqcli.quant.level_kinds import PATTERN_ZERO, LevelKind, grid_pattern
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern


def squared_error_by_bits(
    distribution: Histogram, bits: range, kind: LevelKind = "learned"
) -> dict[int, float]:
    """Squared error of the best levels at each bit-width, rounding to the grid included."""
    if kind != "learned":
        patterns = {s: grid_pattern(kind, s, s)[0] - PATTERN_ZERO for s in bits}
        return {
            s: squared_error(distribution, fit_pattern(distribution, pattern))
            for s, pattern in patterns.items()
        }
    scale, zero_point = fit_grid(distribution)

    def levels(s: int) -> np.ndarray:
        if s == LEVEL_BITS:
            return np.arange(GRID_STEPS + 1.0) - zero_point
        return np.round(lloyd_max(distribution, 2**s, iterations=12) / scale)

    return {s: squared_error(distribution, levels(s) * scale) for s in bits}
