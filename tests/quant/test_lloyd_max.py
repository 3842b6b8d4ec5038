"""Lloyd-Max levels against the optimum by dynamic programming, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from quant_cases import DISTRIBUTIONS, brute_force_error, sample

from ddqcli.quant.histogram import Histogram, squared_error
from ddqcli.quant.lloyd_max import lloyd_max


def least_error(x: np.ndarray, n: int) -> float:
    """Least squared error of any n levels, by dynamic programming over the sorted values."""
    x = np.sort(x.astype(np.float64))
    sums, squares = np.r_[0, np.cumsum(x)], np.r_[0, np.cumsum(x * x)]
    first, last = np.ogrid[: len(x) + 1, : len(x) + 1]
    square, total = squares[last] - squares[first], sums[last] - sums[first]
    within = square - total**2 / np.maximum(last - first, 1)
    within = np.where(last > first, np.maximum(within, 0), np.where(last == first, 0, np.inf))
    least = within[0].copy()
    for _ in range(n - 1):
        least = np.min(least[:, None] + within, axis=0)
    return float(least[-1])


@pytest.mark.parametrize("shape", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("size", [27, 288])
def test_lloyd_max_comes_close_to_the_optimum_on_small_tensors(shape, n, size):
    x = sample(shape, size)
    error, least = brute_force_error(x, lloyd_max(Histogram.of(x), n)), least_error(x, n)
    assert least <= error * (1 + 1e-6) + 1e-9
    assert error <= 1.2 * least + 1e-5 * np.square(x - x.mean()).sum()


def test_lloyd_max_reaches_the_known_optimum_for_a_gaussian():
    x = sample("gaussian", 400_000)
    known = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}  # Max 1960, table I
    for n, least in known.items():
        assert brute_force_error(x, lloyd_max(Histogram.of(x), n)) / x.size == pytest.approx(
            least, rel=0.01
        )


def test_lloyd_max_never_worsens_the_levels_it_starts_from():
    x = sample("two peaks", 3000)
    distribution = Histogram.of(x)
    start = np.linspace(x.min(), x.max(), 8)
    assert brute_force_error(x, lloyd_max(distribution, 8, start=start)) < brute_force_error(
        x, start
    )


def test_lloyd_max_returns_the_values_themselves_where_levels_suffice():
    levels = lloyd_max(Histogram.of(np.array([3.0, -1.0, 3.0, 0.5], np.float32)), 4)
    np.testing.assert_allclose(levels, [-1, 0.5, 3, 3])


def test_constant_values_have_one_point_and_no_error():
    constant = Histogram.of(np.full((3, 5), 0.25, np.float32))
    mean, count, _ = constant.points()
    assert mean.tolist() == [0.25]
    assert count.tolist() == [15]
    assert squared_error(constant, lloyd_max(constant, 4)) == 0
