"""Histograms and squared errors against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
from quant_cases import DISTRIBUTIONS, brute_force_error, sample

from ddqcli.quant.histogram import CHUNK, Histogram, squared_error
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern, uniform_pattern


@pytest.mark.parametrize("n", [1, 1000, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_every_value_is_counted_and_summed(n):
    x = (np.arange(n) % 64 / 64).astype(np.float32)  # each value at the lower end of a bin
    histogram = Histogram.of(x, bins=64, low=0.0, high=1.0)
    expected = np.bincount(np.arange(n) % 64, minlength=64)
    np.testing.assert_array_equal(histogram.count, expected)
    np.testing.assert_allclose(histogram.total, expected * np.arange(64) / 64, rtol=1e-12)
    np.testing.assert_allclose(histogram.square, np.sum(x.astype(np.float64) ** 2), rtol=1e-12)


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    x = sample("laplace", 5000)
    low, high = float(x.min()), float(x.max())
    whole = Histogram.of(x)
    parts = Histogram.of(x[:1700], low=low, high=high) + Histogram.of(x[1700:], low=low, high=high)
    np.testing.assert_array_equal(parts.count, whole.count)
    np.testing.assert_allclose(parts.total, whole.total, atol=1e-9)
    assert parts.square == pytest.approx(whole.square, rel=1e-12)


def test_values_outside_a_given_range_fall_into_the_outer_bins():
    histogram = Histogram.of(np.array([-9.0, 0.1, 0.9, 7.0], np.float32), bins=2, low=0.0, high=1.0)
    np.testing.assert_array_equal(histogram.count, [2, 2])


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1.0, 3e38], ids=str)
def test_any_finite_float32_can_be_summarized(magnitude):
    x = np.array([-1, -1, 0, 1], np.float64) * magnitude
    histogram = Histogram.of(x.astype(np.float32), bins=4)
    np.testing.assert_array_equal(histogram.count, [2, 0, 1, 1])


@pytest.mark.parametrize("shape", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_squared_error_agrees_with_brute_force(shape, bits):
    x = sample(shape, 20_000)
    histogram = Histogram.of(x, bins=1 << 14)
    for levels in (
        lloyd_max(histogram, 2**bits),
        fit_pattern(histogram, uniform_pattern(bits)),
    ):
        assert squared_error(histogram, levels) == pytest.approx(
            brute_force_error(x, levels), rel=0.01
        )


def test_squared_error_takes_levels_in_any_order():
    histogram = Histogram.of(sample("gaussian", 1000))
    assert squared_error(histogram, np.array([1.0, -1.0, 0.0])) == squared_error(
        histogram, np.array([-1.0, 0.0, 1.0])
    )


def test_histograms_over_different_ranges_add_up():
    """Counts, sums and squares stay; each bin moves as a whole to the bin of its mean."""
    a, b = (np.random.default_rng(k).normal(4 * k, 1 + k, 3000).astype(np.float32) for k in (0, 1))
    both, joint = Histogram.of(a) + Histogram.of(b), Histogram.of(np.concatenate([a, b]))
    assert (both.low, both.high) == (joint.low, joint.high)
    assert both.count.sum() == 6000
    assert both.total.sum() == pytest.approx(joint.total.sum())
    assert both.square == pytest.approx(joint.square)
    width = (joint.high - joint.low) / len(joint.count)
    levels = np.linspace(joint.low, joint.high, 7)
    error, expected = squared_error(both, levels), squared_error(joint, levels)
    assert error == pytest.approx(expected, rel=2 * width)
    doubled = Histogram.of(a).scaled(2.0)
    assert doubled.count.sum() == 6000
    assert squared_error(doubled, levels) == pytest.approx(
        2 * squared_error(Histogram.of(a), levels)
    )
