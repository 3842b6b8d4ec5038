"""The kinds of levels a quantizer can have, and the fixed ones on the level grid (Eqns 1 and 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ddqcli.quant.grid import GRID_STEPS, LEVEL_BITS
from ddqcli.quant.patterns import power_of_two_pattern, uniform_pattern

LevelKind = Literal["learned", "uniform", "power_of_two"]

# Beyond 4 bits, Eqn (2) only adds levels that are too close to 0 for the 8-bit grid.
MAX_BITS_BY_KIND: dict[LevelKind, int] = {
    "learned": LEVEL_BITS,
    "uniform": LEVEL_BITS,
    "power_of_two": 4,
}
PATTERN_ZERO = (GRID_STEPS + 1) // 2  # zero point of the fixed patterns


def grid_pattern(kind: LevelKind, s: int, max_bits: int) -> tuple[np.ndarray, float]:
    """Eqn (1) or (2) at s bits as grid positions around `PATTERN_ZERO`, and the clip c in steps.

    Each level is repeated to fill 2^max_bits positions.
    """
    if kind == "uniform" and s == LEVEL_BITS:
        return np.arange(GRID_STEPS + 1.0), float(GRID_STEPS // 2)
    if kind == "uniform":
        intervals = max(2 ** (s - 1) - 1, 1)  # between 0 and c
        pattern, clip = uniform_pattern(s), GRID_STEPS // 2 // intervals * intervals
    else:
        pattern, clip = power_of_two_pattern(s), PATTERN_ZERO
    positions = np.round(pattern * clip) + PATTERN_ZERO
    return np.repeat(positions, 2 ** (max_bits - s)), float(clip)
