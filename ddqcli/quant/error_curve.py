"""Squared error of the best levels at each bit-width."""

from __future__ import annotations

import numpy as np

from ddqcli.quant.grid import GRID_STEPS, LEVEL_BITS, fit_grid
from ddqcli.quant.histogram import Histogram, squared_error
from ddqcli.quant.level_kinds import LevelKind, grid_pattern
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern


def squared_error_by_bits(
    distribution: Histogram, bits: range, kind: LevelKind = "learned"
) -> dict[int, float]:
    """Squared error, rounding to the grid included, of the best levels at each bit-width: what the gates weigh."""
    scale, zero_point = fit_grid(distribution)

    def error(s: int) -> float:
        if kind == "learned":
            grid = np.arange(GRID_STEPS + 1.0) - zero_point
            levels = (
                grid
                if s == LEVEL_BITS
                else np.round(lloyd_max(distribution, 2**s, iterations=12) / scale)
            )
            return squared_error(distribution, levels * scale)
        return squared_error(
            distribution,
            fit_pattern(distribution, grid_pattern(kind, s, s)[0] - (GRID_STEPS + 1) // 2),
        )

    return {s: error(s) for s in bits}
