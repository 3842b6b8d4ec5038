"""The word for a distribution's shape, on large and small samples of known kind."""

from __future__ import annotations

import numpy as np
import pytest

from ddqcli.inspection.distribution import Shape, quantiles, shape_of
from ddqcli.quant.histogram import Histogram

BINS = 1 << 14
SAMPLES = {
    "Gaussian-like": [lambda rng, n: rng.normal(0.01, 0.05, n)],
    "heavy-tailed": [
        lambda rng, n: rng.laplace(size=n),
        lambda rng, n: rng.standard_t(2, n) * 1e-3,
    ],
    "multi-peaked": [
        lambda rng, n: rng.standard_normal(n) + rng.choice([-3.0, 3.0], n),
        lambda rng, n: rng.standard_normal(n) * 0.6 + rng.choice([-3.0, 0.0, 3.0], n),
        lambda rng, n: rng.choice([-0.5, -0.25, 0.25, 0.5], n),  # already quantized
    ],
    "flat": [lambda rng, n: rng.uniform(-0.2, 0.2, n)],
}
KNOWN = [(word, k) for word, kinds in SAMPLES.items() for k in range(len(kinds))]


def describe(values: np.ndarray) -> Shape:
    return shape_of(Histogram.of(values.astype(np.float32), bins=BINS))


@pytest.mark.parametrize(("word", "kind"), KNOWN)
@pytest.mark.parametrize("size", [500, 4608, 300_000])
def test_known_shapes_get_their_word(word, kind, size):
    found = [
        describe(SAMPLES[word][kind](np.random.default_rng(seed), size)).word for seed in range(5)
    ]
    assert found == [word] * 5


@pytest.mark.parametrize("size", [64, 288])
def test_one_peak_is_hardly_ever_taken_for_several(size):
    draw = [SAMPLES["Gaussian-like"][0], SAMPLES["flat"][0], *SAMPLES["heavy-tailed"]]
    found = [
        describe(kind(np.random.default_rng(seed), size)).word
        for kind in draw
        for seed in range(60)
    ]
    assert found.count("multi-peaked") <= 2  # of 240


def test_two_peaks_four_deviations_apart_are_seen_in_288_weights():
    words = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        words.append(describe(rng.standard_normal(288) + rng.choice([-2.0, 2.0], 288)).word)
    assert words.count("multi-peaked") >= 40


def test_moments_and_tail_weight_are_those_of_numpy():
    x = np.random.default_rng(0).standard_t(4, 50_001).astype(np.float32) + 3
    found = describe(x)
    low, first, third, high = np.quantile(x.astype(np.float64), [0.005, 0.25, 0.75, 0.995])
    assert found.mean == pytest.approx(x.astype(np.float64).mean(), rel=1e-9)
    assert found.std == pytest.approx(x.astype(np.float64).std(), rel=1e-6)
    assert found.tail_weight == pytest.approx((high - low) / (third - first) / 3.8194, rel=2e-3)


def test_tail_weight_of_a_gaussian_is_one_whatever_its_scale():
    for scale in (1e-30, 1.0, 1e20):
        x = np.random.default_rng(1).standard_normal(400_000) * scale
        assert describe(x).tail_weight == pytest.approx(1, abs=0.01)


def test_quantiles_of_few_values_are_interpolated_between_them():
    distribution = Histogram.of(np.array([0.0, 1.0, 2.0, 10.0], np.float32), bins=BINS)
    np.testing.assert_allclose(
        quantiles(distribution, np.array([0.0, 0.375, 0.5, 1.0])), [0, 1, 1.5, 10]
    )


def test_a_pruned_tensor_has_finite_heavy_tails():
    x = np.zeros(10_000)
    x[:300] = np.random.default_rng(0).standard_normal(300)
    found = describe(x)
    assert found.word == "heavy-tailed"
    assert np.isfinite(found.tail_weight)


def test_constant_and_tiny_tensors_get_words_of_their_own():
    constant = describe(np.full(1000, 0.3))
    assert (constant.word, constant.std, constant.tail_weight) == ("constant", 0.0, 0.0)
    assert describe(np.arange(63)).word == "too few"
