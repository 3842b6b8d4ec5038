"""Uniform and power-of-two patterns, and their clipping threshold against a fine search."""

from __future__ import annotations

import numpy as np
import pytest
from quant_cases import brute_force_error, sample

from ddqcli.quant.histogram import Histogram
from ddqcli.quant.patterns import fit_pattern, power_of_two_pattern, uniform_pattern


def test_patterns_are_those_of_eqn_1_and_eqn_2():
    np.testing.assert_allclose(uniform_pattern(3), [-1, -2 / 3, -1 / 3, 0, 0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(
        power_of_two_pattern(3), [-0.5, -0.25, -0.125, 0, 0, 0.125, 0.25, 0.5]
    )


@pytest.mark.parametrize("pattern", [uniform_pattern, power_of_two_pattern])
@pytest.mark.parametrize("shape", ["gaussian", "far tails"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_fitted_clipping_threshold_has_the_least_error(pattern, shape, bits):
    x = sample(shape, 4000)
    levels = fit_pattern(Histogram.of(x, bins=1 << 14), pattern(bits))
    np.testing.assert_allclose(
        levels / levels.max(), pattern(bits) / pattern(bits).max(), atol=1e-12
    )
    thresholds = np.abs(x).max() * np.geomspace(1 / 500, 1, 800)
    least = min(brute_force_error(x, pattern(bits) / pattern(bits).max() * c) for c in thresholds)
    assert brute_force_error(x, levels) <= 1.01 * least
