"""ActivationQuantizer: its step against brute force and LSQ, its levels against Eqn (3)."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import few, normal, seeds
from torch import Tensor, nn

from ddqcli.errors import DDQError
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.grid import representable_scale


def uniform(bits: int, log2_scale: float, low: int = 0) -> ActivationQuantizer:
    """A quantizer with a learned step whose codes run from -low."""
    quantizer = ActivationQuantizer(bits, "uniform")
    nn.init.constant_(quantizer.log2_scale, log2_scale)
    quantizer.zero_point.fill_(low)
    quantizer.low_code = -low
    return quantizer


def fitted(x: Tensor, bits: int, levels: str = "auto") -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, levels)
    quantizer.observing = True
    assert quantizer(x) is x
    assert quantizer.fit()
    return quantizer


def decisions(scale: float, low: int, high: int) -> Tensor:
    """All codes and ties between them, one ulp on either side, and far outside."""
    steps = torch.arange(2 * low - 4, 2 * high + 5, dtype=torch.float64) / 2 * scale
    ties, inf = steps.float(), torch.tensor(math.inf)
    far = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e20, -1e20])
    return torch.cat([ties, ties.nextafter(inf), ties.nextafter(-inf), far])


# ---- uniform steps


def brute_force(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """round half to even of x / scale, clamped, in float64; 0 for -0."""
    return torch.from_numpy(np.clip(np.rint(x.double().numpy() / scale), low, high) * scale + 0.0)


@few
@given(
    st.integers(1, 8),
    st.floats(-60, 60),
    st.floats(0, 1),
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_uniform_step_rounds_half_to_even_and_clamps(bits, log2_scale, share, seed, dtype):
    low = round(share * (2**bits - 1))
    quantizer = uniform(bits, log2_scale, low)
    scale, high = float(quantizer.scale().detach()), 2**bits - 1 - low
    assert 2.0**log2_scale * (1 - 1e-5) <= scale <= 2.0**log2_scale * (1 + 2.0**-10)
    x = torch.cat([decisions(scale, -low, high), normal(100, seed=seed) * 2**bits * scale]).to(
        dtype
    )
    assert oracle.same_bits(quantizer(x), brute_force(x, scale, -low, high).float().to(dtype))


@pytest.mark.parametrize("low", [0, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_size_has_the_gradient_of_lsq(low, dtype):
    """Esser et al. 2020, Eqn (3): round(v) - v inside, the outermost code outside, v = x / s."""
    quantizer = uniform(4, -2.0, low)
    x, grad = normal(3000).mul(2).to(dtype).requires_grad_(), normal(3000, seed=1).to(dtype)
    found_x, found = torch.autograd.grad(quantizer(x), (x, quantizer.log2_scale), grad)
    steps, first, last = x.detach().double() / 0.25, -low, 15 - low
    inside = (steps >= first) & (steps <= last)
    slope = torch.where(inside, steps.round() - steps, steps.clamp(first, last).round())
    expected = float((grad.double() * slope).sum()) * 0.25 * math.log(2)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert found_x.dtype == dtype
    assert torch.equal(found_x, torch.where(inside, grad, 0.0))


def test_the_step_size_has_the_gradient_of_finite_differences_where_codes_are_clipped():
    """Outside, x_q is the outermost code times the step: a true derivative, no estimator."""
    x = torch.tensor([50.0, 60, -9, -30])
    slopes = []
    for log2_scale in (1e-2, -1e-2):
        quantizer = uniform(4, log2_scale, 4)
        slopes.append(float(quantizer(x).detach().double().sum()))
    quantizer = uniform(4, 0.0, 4)
    (found,) = torch.autograd.grad(quantizer(x).sum(), quantizer.log2_scale)
    assert float(found) == pytest.approx((slopes[0] - slopes[1]) / 2e-2, rel=0.05)
    assert float(found) == pytest.approx((11 + 11 - 4 - 4) * math.log(2), rel=1e-5)


# ---- learned levels


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
@pytest.mark.parametrize("signed", [False, True])
def test_learned_levels_are_eqn_3(bits, signed):
    x = normal(4, 3, 8, 8) if signed else normal(4, 3, 8, 8).relu()
    quantizer = fitted(x, bits, "learned")
    learned = quantizer.learned
    learned.levels.data += normal(1, 2**bits, seed=2) * 3
    scale, zero_point = float(learned.scale), float(learned.zero_point)
    assert (zero_point > 0) == signed
    for values in (x, oracle.edge_cases(scale, zero_point)):
        expected = oracle.quantize(values, learned.levels.detach()[0], bits, scale, zero_point)
        assert oracle.same_bits(quantizer(values), expected.float())
    quantizer(x).square().sum().backward()
    assert learned.levels.grad.any()
    assert quantizer.log2_scale.grad is None


def test_levels_are_learned_up_to_4_bits_by_default():
    assert [ActivationQuantizer(b).learned is not None for b in range(1, 9)] == [True] * 4 + [
        False
    ] * 4
    assert ActivationQuantizer(6, "learned").learned is not None
    assert ActivationQuantizer(2, "uniform").learned is None


# ---- both


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_the_table_holds_the_levels_that_forward_returns(levels, bits, signed):
    x = normal(5000) if signed else normal(5000).relu()
    quantizer = fitted(x, bits, levels)
    table = quantizer.table()
    assert table["levels"].dtype == torch.uint8
    assert table["levels"].shape == (2**bits,)
    assert 0 <= table["zero_point"] <= 255
    values = ((table["levels"].double() - table["zero_point"]) * table["scale"]).float()
    assert oracle.same_bits(quantizer(values), values)  # every level is its own nearest
    expected = values[oracle.nearest(x, values)]
    # Uniform steps round ties to even, learned levels round them up.
    different = quantizer(x) != expected
    assert not (different & ((quantizer(x) - x).abs() != (expected - x).abs())).any()
    assert bool(torch.isin(quantizer(x).detach().view(torch.int32), values.view(torch.int32)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", ["relu", "signed", "shifted", "negative"])
def test_the_fitted_step_comes_close_to_the_best_one(bits, shape):
    x = normal(20_000)
    x = {"relu": x.relu(), "signed": x, "shifted": x + 1, "negative": -x.relu()}[shape]
    quantizer = fitted(x, bits, "uniform")

    def error(scale: float, low: int) -> float:
        return float((brute_force(x, scale, -low, 2**bits - 1 - low) - x.double()).square().sum())

    reach = float(x.max() - x.min())
    lows = {"relu": [0], "negative": [2**bits - 1]}.get(
        shape, range(0, 2**bits, max(1, 2**bits // 16))
    )
    least = min(
        error(s, low) for s in np.linspace(0.1, 1, 40) * reach / (2**bits - 1) for low in lows
    )
    found = float((quantizer(x).detach().double() - x.double()).square().sum())
    assert found <= 1.2 * least  # it keeps the share of the range that lies below 0
    if shape == "relu":
        assert quantizer.low_code == 0


@pytest.mark.parametrize("levels", ["learned", "uniform"])
def test_it_observes_all_inputs_and_then_quantizes(levels):
    """About as well as levels that were fitted to all values at once."""
    quantizer = ActivationQuantizer(3, levels)
    assert not quantizer.fit()  # no input was observed
    quantizer.observing = True
    inputs = [torch.zeros(50), normal(100), torch.zeros(0), normal(100, seed=1) * 50 + 20]
    for x in inputs:
        assert quantizer(x) is x
    assert quantizer.values == 50
    assert quantizer.fit()
    everything = torch.cat(inputs)
    alone = fitted(everything, 3, levels)
    errors = [
        float((q(everything) - everything).double().square().sum()) for q in (quantizer, alone)
    ]
    assert errors[0] < 1.02 * errors[1]
    assert not quantizer.saw_only_zeros


def test_the_ranges_of_the_calls_of_a_pass_are_told_apart():
    quantizer = ActivationQuantizer(8)
    assert quantizer.range_ratio == 1
    for first, second in ((0.0, -1.0), (2.0, 30.0), (-3.0, 4.0)):
        quantizer.observe_pass()
        for value in (first, second):
            quantizer(torch.tensor([value, 0.5 * value]))
    assert quantizer.fit()
    assert quantizer.ranges == [3, 30]
    assert quantizer.range_ratio == 10
    quantizer(torch.full((2,), 99.0))  # after `fit`, nothing is observed
    assert quantizer.ranges == [3, 30]


def test_of_a_large_input_some_values_stand_for_all_and_its_range_counts():
    quantizer = ActivationQuantizer(8)
    quantizer.observing = True
    large = normal(400_000, seed=2)
    large[399_999] = 7.5
    for x in (torch.zeros(1000), large):
        quantizer(x)
    histogram = quantizer.histogram
    assert histogram.high == 7.5
    assert histogram.low == float(large.min())
    assert histogram.count.sum() == pytest.approx(401_000)
    assert histogram.square == pytest.approx(float(large.double().square().sum()), rel=0.02)


@pytest.mark.parametrize(("bits", "levels"), [(8, "uniform"), (3, "learned")])
def test_zeros_alone_are_known_as_such(bits, levels):
    assert fitted(torch.zeros(9), bits, levels).saw_only_zeros
    assert not fitted(torch.full((9,), 1e-6), bits, levels).saw_only_zeros


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("bits", [2, 5])
def test_a_loaded_quantizer_has_the_results_of_the_saved_one(levels, bits):
    x = normal(500) - 0.3
    quantizer = fitted(x, bits, levels)
    other = ActivationQuantizer(bits, levels)
    other.observing = True
    other.load_state_dict(quantizer.state_dict())
    assert other.low_code == quantizer.low_code
    assert other.low_code < 0 or levels == "learned"
    assert oracle.same_bits(other(x), quantizer(x))
    assert other.table().keys() == quantizer.table().keys()


def test_loading_restores_the_bits_of_learned_levels():
    x = normal(500)
    quantizer = fitted(x, 4, "learned")
    quantizer.learned.fit(x, 2)
    other = ActivationQuantizer(4, "learned")
    other.load_state_dict(quantizer.state_dict())
    assert other.learned.bits == (2,)
    assert oracle.same_bits(other(x), quantizer(x))


@pytest.mark.parametrize("levels", ["learned", "uniform"])
def test_in_autocast_the_bfloat16_input_is_quantized_by_its_exact_value(levels):
    x = normal(8, 16)
    quantizer, layer = fitted(x, 4, levels), nn.Linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)
        assert hidden.dtype == torch.bfloat16
        out = quantizer(hidden)
        layer(out).sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantizer(hidden.float()).bfloat16())
    learned = quantizer.learned.levels if levels == "learned" else quantizer.log2_scale
    assert bool(learned.grad.isfinite().all())
    assert learned.grad.any()


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_memory_layout_changes_neither_values_nor_gradients_of_activations(levels, layout):
    x, grad = normal(2, 3, 5, 5), normal(2, 3, 5, 5, seed=1)
    quantizer = fitted(x, 3, levels)
    results = []
    for inputs in (x.clone(), x.contiguous(memory_format=layout)):
        inputs.requires_grad_()
        out = quantizer(inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_that_are_not_finite_become_nan_and_are_not_observed(levels, bad, dtype):
    x = normal(40)
    quantizer = fitted(x, 3, levels)
    x[7] = bad
    assert quantizer(x.to(dtype))[7].isnan()
    quantizer.observing = True
    with pytest.raises(DDQError, match=r"1 of 40 values .* NaN or infinite"):
        quantizer(x.to(dtype))


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_constant_and_empty_batches(levels, value):
    quantizer = fitted(torch.full((2, 5), value), 3, levels)
    out = quantizer(torch.full((2, 5), value)).detach()
    assert float((out - value).abs().max()) <= abs(value) / 100
    assert quantizer(torch.zeros(0, 5)).shape == (0, 5)


def test_scales_have_twelve_significant_bits_wherever_training_takes_them():
    for log2_scale in np.linspace(-20, 20, 101):
        scale = uniform(8, float(log2_scale)).scale().detach()
        assert torch.equal(scale, representable_scale(scale))
