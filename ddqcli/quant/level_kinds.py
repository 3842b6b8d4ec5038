"""The kinds of levels a quantizer can have, and the fixed ones on the level grid (Eqns 1 and 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ddqcli.quant.grid import GRID_STEPS, LEVEL_BITS
from ddqcli.quant.patterns import power_of_two_pattern, uniform_pattern

LevelKind = Literal["learned", "uniform", "power_of_two"]

# With more bits, Eqn (2) has no level on the 8-bit grid that it has not with these.
MAX_BITS_BY_KIND: dict[LevelKind, int] = {
    "learned": LEVEL_BITS,
    "uniform": LEVEL_BITS,
    "power_of_two": 4,
}


def grid_pattern(kind: LevelKind, s: int, max_bits: int) -> tuple[np.ndarray, float]:
    """Eqn (1) or Eqn (2) at s bits on the grid around 128, repeated to 2^max_bits, and the clip c in grid steps."""
    if kind == "uniform" and s == LEVEL_BITS:
        return np.arange(GRID_STEPS + 1.0), float(GRID_STEPS // 2)
    pattern = uniform_pattern(s) if kind == "uniform" else power_of_two_pattern(s)
    unit = (
        GRID_STEPS // 2 // max(2 ** (s - 1) - 1, 1) * max(2 ** (s - 1) - 1, 1)
        if kind == "uniform"
        else (GRID_STEPS + 1) // 2
    )
    positions = np.round(pattern * unit) + (GRID_STEPS + 1) // 2
    return np.repeat(positions, 2 ** (max_bits - s)), float(unit)
