"""DDQuantizer: fit, indices, bits and state."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import few, normal, seeds, squared_error, values_in_force

from ddqcli.errors import DDQError
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.quantizer import DDQuantizer


def test_learned_levels_at_8_bits_are_the_whole_grid():
    x = normal(2000)
    quantizer = DDQuantizer.from_tensor(x, 8)
    scale, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    expected = oracle.quantize(x, torch.arange(256.0), 8, scale, zero_point).float()
    out = quantizer(x)
    assert oracle.same_bits(out, expected)
    out.sum().backward()
    assert not quantizer.levels.grad.any()  # nothing to learn but the range


@pytest.mark.parametrize("max_bits", [0, 9, -1])
def test_bits_beyond_the_level_grid_are_refused(max_bits):
    with pytest.raises(ValueError, match=f"max_bits is {max_bits}, .*: 1 to 8 are possible"):
        DDQuantizer(1, max_bits)


@few
@given(
    seeds,
    st.sampled_from(oracle.all_bits()),
    st.sampled_from(["learned", "uniform", "power_of_two"]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_indices_select_what_forward_returns(seed, bits, kind, axis, dtype):
    b, s = bits
    x = normal(3, 4, 5, seed=seed).to(dtype)
    quantizer = DDQuantizer.from_tensor(x, b, s, kind=kind, channel_axis=axis)
    if axis is not None:
        quantizer.bits = tuple(max(1, s - g % 2) for g in range(len(quantizer.bits)))
    indices = quantizer.indices(x)
    assert indices.dtype == torch.uint8
    groups = range(len(quantizer.bits))
    slices = [x, *()] if axis is None else x.unbind(axis)
    chosen = [indices] if axis is None else indices.unbind(axis)
    outputs = [quantizer(x)] if axis is None else quantizer(x).unbind(axis)
    for g, part, index, out in zip(groups, slices, chosen, outputs, strict=True):
        values = values_in_force(quantizer, g)
        assert oracle.same_bits(values[index.long()].to(dtype), out)
        # Among equal levels any index will do.
        expected = values[oracle.nearest(part.double(), values)]
        assert torch.equal(values[index.long()], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_their_number(bad):
    x = normal(4, 6)
    quantizer = DDQuantizer.from_tensor(x, 4, channel_axis=0)
    x[2, 3] = bad
    with pytest.raises(DDQError, match=r"1 of 24 values .* NaN or infinite"):
        quantizer.indices(x)
    with pytest.raises(DDQError, match="1 of 24 values"):
        quantizer.fit(x, 2)
    with pytest.raises(DDQError, match="1 of 24 values"):
        DDQuantizer.from_tensor(x, 4)


@pytest.mark.parametrize("shape", ["gaussian", "laplace", "shifted", "positive"])
@pytest.mark.parametrize("s", range(1, 8))
def test_fit_gives_lloyd_max_levels_at_its_bits_and_good_ones_at_neighboring_bits(s, shape):
    x = normal(4000, seed=s)
    x = {"gaussian": x, "laplace": x * x.abs(), "shifted": x * 0.1 + 5, "positive": x.relu()}[shape]
    quantizer = DDQuantizer.from_tensor(x, 8)
    quantizer.fit(x, s)
    assert quantizer.bits == (s,)
    fitted = lloyd_max(Histogram.of(x.numpy()), 2**s)
    scale = float(quantizer.scale)
    np.testing.assert_allclose(values_in_force(quantizer), fitted, atol=scale * 0.501)
    for other in {max(1, s - 1), s + 1}:  # a gate may close or open before the next fit
        quantizer.bits = (other,)
        least = squared_error(DDQuantizer.from_tensor(x, 8, other), x)
        assert squared_error(quantizer, x) <= 2.5 * least


@pytest.mark.parametrize("s", [1, 3, 8])
def test_uniform_start_spans_the_range_evenly_as_the_paper_does(s):
    x = normal(500)
    quantizer = DDQuantizer.from_tensor(x, 8, s, init="uniform")
    values = values_in_force(quantizer)
    step = float(quantizer.scale)
    assert abs(float(values[0] - x.min())) <= step
    assert abs(float(values[-1] - x.max())) <= step
    np.testing.assert_allclose(values.diff(), 255 / (2**s - 1) * step, atol=1.01 * step)


@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
@pytest.mark.parametrize("axis", [0, 1])
def test_channels_are_fitted_as_separate_tensors(kind, axis):
    x = normal(3, 3, 50) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    x = x.transpose(0, axis)
    together = DDQuantizer.from_tensor(x, 4, 3, kind=kind, channel_axis=axis)
    alone = [DDQuantizer.from_tensor(part, 4, 3, kind=kind)(part) for part in x.unbind(axis)]
    assert torch.equal(together(x), torch.stack(alone, axis))


@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.25, 1e-38, -4e37])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constant_tensors_are_reproduced_to_one_percent(kind, value, bits):
    x = torch.full((2, 9), value)
    out = DDQuantizer.from_tensor(x, bits, kind=kind)(x).detach().double()
    smallest = 2.0**-92  # 255 steps of the smallest scale
    assert float((out - value).abs().max()) <= max(abs(value) / 100, smallest)


def test_the_largest_float32_values_are_clipped_and_stay_finite():
    x = torch.tensor([-3.4028234e38, 1.0, 3.4028234e38])
    for kind in ("learned", "uniform", "power_of_two"):
        out = DDQuantizer.from_tensor(x, 4, kind=kind)(x)
        assert bool(out.isfinite().all())
        assert out[[0, 2]].sign().tolist() == [-1, 1]


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((3, 0), 0), ((2, 3, 0), 1)])
@pytest.mark.parametrize("kind", ["learned", "uniform"])
def test_empty_tensors_pass_through(shape, axis, kind):
    x = torch.zeros(shape)
    quantizer = DDQuantizer.from_tensor(x, 4, kind=kind, channel_axis=axis)
    assert quantizer(x).shape == quantizer.indices(x).shape == shape


def test_gradient_correction_draws_the_outer_level_to_the_weights_beyond_it():
    """Weights outside the levels get no gradient; the levels move toward them instead."""
    x = torch.tensor([-1.0, 0, 1, 2, 2.2, 2.4]).requires_grad_()
    quantizer = DDQuantizer.from_tensor(torch.tensor([-1.0, 0, 1, 2.4]), 2)
    quantizer.levels.data[0, 3] -= 60
    quantizer.correction = 1.0
    out = quantizer(x)
    assert float(out.detach().max()) < 2
    (0 * out).sum().backward()
    assert not x.grad.any()
    assert quantizer.levels.grad[0, 3] < 0  # a step of descent raises it
    for _ in range(200):
        (grad,) = torch.autograd.grad(0 * quantizer(x).sum(), quantizer.levels)
        quantizer.levels.data -= 100 * grad
    assert float(quantizer(x).detach().max()) == pytest.approx(2.2, abs=float(quantizer.scale))


@few
@given(
    st.lists(st.integers(1, 6), min_size=4, max_size=4),
    st.sampled_from([1.0, 1e-8, 0.0]),
    st.booleans(),
)
def test_fit_sets_gates_that_give_its_bits(bits, logit, opened_before):
    x = normal(4, 20)
    quantizer = DDQuantizer.from_tensor(x, 6, channel_axis=0)
    quantizer.gate_logits.data.fill_(logit if opened_before else -logit)
    quantizer.fit(x, tuple(bits))
    quantizer.update_bits()
    assert quantizer.bits == tuple(bits)


@few
@given(st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=5))
def test_bits_are_the_number_of_open_gates_and_at_least_one(logits):
    quantizer = DDQuantizer(1, 5)
    quantizer.gate_logits.data[0] = torch.tensor(logits)
    quantizer.update_bits()
    assert quantizer.bits == (max(1, sum(g >= 0 for g in logits)),)


@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
def test_a_loaded_quantizer_has_the_bits_and_results_of_the_saved_one(kind):
    x = normal(3, 40)
    quantizer = DDQuantizer.from_tensor(x, 4, kind=kind, channel_axis=0)
    quantizer.fit(x, (1, 2, 4))
    other = DDQuantizer(3, 4, kind=kind)
    other.load_state_dict(quantizer.state_dict())
    assert other.bits == (1, 2, 4)
    assert torch.equal(other(x), quantizer(x))


@pytest.mark.parametrize(("kind", "learned"), [("learned", {"levels"}), ("uniform", {"log2_clip"})])
def test_only_the_parameters_of_the_kind_are_trained(kind, learned):
    quantizer = DDQuantizer.from_tensor(normal(50), 4, kind=kind)
    assert {name for name, p in quantizer.named_parameters() if p.requires_grad} == learned
    quantizer(normal(50)).square().sum().backward()
    assert {
        name for name, p in quantizer.named_parameters() if p.grad is not None and p.grad.any()
    } == learned


def test_its_description_gives_bits_kind_and_channels():
    quantizer = DDQuantizer.from_tensor(normal(2, 50), 4, 2)
    assert repr(quantizer) == "DDQuantizer(2 of at most 4 bits, learned levels)"
    channels = DDQuantizer(3, 8, kind="uniform", axis=1)
    channels.fit(normal(5, 3), (2, 4, 3))
    assert repr(channels) == (
        "DDQuantizer(2 to 4 of at most 8 bits, uniform levels, 3 channels along axis 1)"
    )
