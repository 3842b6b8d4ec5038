"""Uniform and power-of-two levels (Eqns 1 and 2) and their clipping threshold. Needs numpy only."""

from __future__ import annotations

import numpy as np

from ddqcli.quant.histogram import Array, Histogram, squared_errors


def uniform_pattern(bits: int) -> Array:
    """Eqn (1) for c = 1 and no shift: 2^b levels from -1 to 1, 0 twice so that there are 2^b."""
    positive = np.arange(2 ** (bits - 1)) / max(2 ** (bits - 1) - 1, 1) if bits > 1 else np.ones(1)
    return np.concatenate([-positive[::-1], positive])


def power_of_two_pattern(bits: int) -> Array:
    """Eqn (2) for c = 1 and no shift: 2^b levels from -2^-1 to 2^-1, halving toward 0, 0 twice."""
    half = 2 ** (bits - 1)
    powers = 2.0 ** -np.arange(half - 1, 0, -1.0)
    positive = np.concatenate([[0.0], powers]) if bits > 1 else np.array([0.5])
    return np.concatenate([-positive[::-1], positive])


def fit_pattern(distribution: Histogram, pattern: Array, candidates: int = 64) -> Array:
    """Return `pattern` times the clipping threshold c of least squared error.

    The search goes from the largest absolute value down in steps of 8 %, then finely about the
    best of these.
    """
    reach = max(abs(distribution.low), abs(distribution.high)) / pattern.max()
    reach = reach or 2.0**-99  # all values are 0: any tiny threshold serves
    coarse = reach * 2.0 ** (-np.arange(candidates) / 8)
    best = coarse[int(np.argmin(squared_errors(distribution, coarse[:, None] * pattern)))]
    fine = np.minimum(best * 2.0 ** (np.linspace(-1, 1, candidates + 1) / 8), reach)
    best = fine[int(np.argmin(squared_errors(distribution, fine[:, None] * pattern)))]
    fitted: Array = pattern * best
    return fitted
