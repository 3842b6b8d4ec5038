"""Fitted levels against brute force in float64: counts, sums, errors, and the exact optimum by dynamic programming."""

from __future__ import annotations

import numpy as np
import pytest

from ddqcli.quant.histogram import CHUNK, Histogram, squared_error
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern, power_of_two_pattern, uniform_pattern

SHAPES = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "far tails": lambda rng, n: rng.standard_t(2, n),
    "two peaks": lambda rng, n: rng.standard_normal(n) + rng.choice([-3.0, 3.0], n),
    "shifted": lambda rng, n: rng.standard_normal(n) * 0.01 + 1,
}


def sample(shape: str, n: int, seed: int = 0) -> np.ndarray:
    return SHAPES[shape](np.random.default_rng(seed), n).astype(np.float32)


def brute_error(x: np.ndarray, levels: np.ndarray) -> float:
    """Sum of squared distances to the nearest level, one level at a time, in float64."""
    nearest = np.full(x.size, np.inf)
    for level in levels:
        nearest = np.minimum(nearest, (x.reshape(-1).astype(np.float64) - level) ** 2)
    return float(nearest.sum())


def least_error(x: np.ndarray, n: int) -> float:
    """The least squared error any n levels can reach, by dynamic programming over the sorted values."""
    x = np.sort(x.astype(np.float64))
    sums, squares = np.r_[0, np.cumsum(x)], np.r_[0, np.cumsum(x * x)]
    first, last = np.ogrid[: len(x) + 1, : len(x) + 1]
    within = (
        squares[last]
        - squares[first]
        - (sums[last] - sums[first]) ** 2 / np.maximum(last - first, 1)
    )
    within = np.where(last > first, np.maximum(within, 0), np.where(last == first, 0, np.inf))
    least = within[0].copy()
    for _ in range(n - 1):
        least = np.min(least[:, None] + within, axis=0)
    return float(least[-1])


@pytest.mark.parametrize("n", [1, 1000, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_distribution_counts_and_sums_every_value(n):
    x = (np.arange(n) % 64 / 64).astype(
        np.float32
    )  # values in the middle of nothing: every one starts a bin
    found = Histogram.of(x, bins=64, low=0.0, high=1.0)
    expected = np.bincount(np.arange(n) % 64, minlength=64)
    np.testing.assert_array_equal(found.count, expected)
    np.testing.assert_allclose(found.total, expected * np.arange(64) / 64, rtol=1e-12)
    np.testing.assert_allclose(found.square, np.sum(x.astype(np.float64) ** 2), rtol=1e-12)


def test_distributions_of_parts_add_up_to_that_of_the_whole():
    x = sample("laplace", 5000)
    low, high = float(x.min()), float(x.max())
    whole = Histogram.of(x)
    parts = Histogram.of(x[:1700], low=low, high=high) + Histogram.of(x[1700:], low=low, high=high)
    np.testing.assert_array_equal(parts.count, whole.count)
    np.testing.assert_allclose(parts.total, whole.total, atol=1e-9)
    assert parts.square == pytest.approx(whole.square, rel=1e-12)


def test_values_outside_a_given_range_fall_into_the_outer_bins():
    found = Histogram.of(np.array([-9.0, 0.1, 0.9, 7.0], np.float32), bins=2, low=0.0, high=1.0)
    np.testing.assert_array_equal(found.count, [2, 2])


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1.0, 3e38], ids=str)
def test_any_finite_float32_can_be_summarised(magnitude):
    x = np.array([-1, -1, 0, 1], np.float64) * magnitude
    found = Histogram.of(x.astype(np.float32), bins=4)
    np.testing.assert_array_equal(found.count, [2, 0, 1, 1])


def test_constant_values_have_one_point_and_no_error():
    constant = Histogram.of(np.full((3, 5), 0.25, np.float32))
    mean, count, _ = constant.points()
    assert mean.tolist() == [0.25]
    assert count.tolist() == [15]
    assert squared_error(constant, lloyd_max(constant, 4)) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_squared_error_is_that_of_brute_force(shape, bits):
    x = sample(shape, 20_000)
    distribution = Histogram.of(x, bins=1 << 14)
    for levels in (
        lloyd_max(distribution, 2**bits),
        fit_pattern(distribution, uniform_pattern(bits)),
    ):
        assert squared_error(distribution, levels) == pytest.approx(
            brute_error(x, levels), rel=0.01
        )


def test_squared_error_takes_levels_in_any_order():
    distribution = Histogram.of(sample("gaussian", 1000))
    assert squared_error(distribution, np.array([1.0, -1.0, 0.0])) == squared_error(
        distribution, np.array([-1.0, 0.0, 1.0])
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("size", [27, 288])
def test_lloyd_max_comes_close_to_the_optimum_on_small_tensors(shape, n, size):
    x = sample(shape, size)
    error, least = brute_error(x, lloyd_max(Histogram.of(x), n)), least_error(x, n)
    assert least <= error * (1 + 1e-6) + 1e-9
    assert error <= 1.2 * least + 1e-5 * np.square(x - x.mean()).sum()


def test_lloyd_max_reaches_the_known_optimum_for_a_gaussian():
    x = sample("gaussian", 400_000)
    known = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}  # Max 1960, table I
    for n, least in known.items():
        assert brute_error(x, lloyd_max(Histogram.of(x), n)) / x.size == pytest.approx(
            least, rel=0.01
        )


def test_lloyd_max_never_worsens_the_levels_it_starts_from():
    x = sample("two peaks", 3000)
    distribution = Histogram.of(x)
    start = np.linspace(x.min(), x.max(), 8)
    assert brute_error(x, lloyd_max(distribution, 8, start=start)) < brute_error(x, start)


def test_lloyd_max_returns_the_values_themselves_where_levels_suffice():
    levels = lloyd_max(Histogram.of(np.array([3.0, -1.0, 3.0, 0.5], np.float32)), 4)
    np.testing.assert_allclose(levels, [-1, 0.5, 3, 3])


def test_patterns_are_the_papers():
    np.testing.assert_allclose(uniform_pattern(3), [-1, -2 / 3, -1 / 3, 0, 0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(
        power_of_two_pattern(3), [-0.5, -0.25, -0.125, 0, 0, 0.125, 0.25, 0.5]
    )


@pytest.mark.parametrize("pattern", [uniform_pattern, power_of_two_pattern])
@pytest.mark.parametrize("shape", ["gaussian", "far tails"])
@pytest.mark.parametrize("bits", [2, 4])
def test_scaled_finds_the_best_clipping_threshold(pattern, shape, bits):
    x = sample(shape, 4000)
    levels = fit_pattern(Histogram.of(x, bins=1 << 14), pattern(bits))
    np.testing.assert_allclose(
        levels / levels.max(), pattern(bits) / pattern(bits).max(), atol=1e-12
    )
    thresholds = np.abs(x).max() * np.geomspace(1 / 500, 1, 800)
    least = min(brute_error(x, pattern(bits) / pattern(bits).max() * c) for c in thresholds)
    assert brute_error(x, levels) <= 1.01 * least
