"""DDQuantizer: what its levels are for each kind, how they start and re-centre, and its indices."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddqcli.errors import DDQError
from ddqcli.quant.error_curve import squared_error_by_bits
from ddqcli.quant.grid import fit_grid
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.level_kinds import MAX_BITS_BY_KIND
from ddqcli.quant.levels import spread_levels
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.quantizer import DDQuantizer

few = settings(deadline=None, derandomize=True, max_examples=50)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values_in_force(quantizer: DDQuantizer, group: int = 0) -> Tensor:
    levels, scale, zero_point = quantizer.effective_levels()
    return (levels[group] - zero_point[group]) * scale[group]


def squared_error(quantizer: DDQuantizer, x: Tensor) -> float:
    return float((quantizer(x).detach().double() - x.double()).square().sum())


# ---- the kinds


def nearest_fraction(x: float, levels: list[Fraction]) -> Fraction:
    """The level nearest to x in exact arithmetic, the upper one of two."""
    return max(levels, key=lambda level: (-abs(level - Fraction(x)), level))


def uniform_levels(bits: int, c: Fraction) -> list[Fraction]:
    """Eqn (1), x-bar = 0: 0 counted twice, so 2^b - 1 different ones."""
    n = 2 ** (bits - 1) - 1
    return [c * j / n for j in range(-n, n + 1)] if n else [-c, c]


def power_of_two_levels(bits: int, c: Fraction) -> list[Fraction]:
    """Eqn (2), x-bar = 0. At one bit only the outermost two are left, as in Eqn (1)."""
    positive = [c / 2**j for j in range(1, 2 ** (bits - 1))] or [c / 2]
    return [-p for p in positive] + [Fraction(0)] * (bits > 1) + positive[::-1]


@pytest.mark.parametrize("log2_clip", [-9.3, 0.0, 3.77])
@pytest.mark.parametrize(
    ("kind", "bits"),
    [("uniform", s) for s in range(1, 8)] + [("power_of_two", s) for s in range(1, 5)],
)
def test_fixed_levels_are_those_of_eqn_1_and_eqn_2_exactly(kind, bits, log2_clip):
    for max_bits in {bits, 8}:
        quantizer = DDQuantizer(1, max_bits, kind=kind)
        quantizer.bits = (bits,)
        torch.nn.init.constant_(quantizer.log2_clip, log2_clip)
        top = Fraction(float(values_in_force(quantizer).max()))
        c = top if kind == "uniform" else 2 * top
        assert (
            2**log2_clip * (1 - 1e-6) <= c <= 2**log2_clip * (1 + 2**-10)
        )  # c, rounded up to 12 significant bits
        levels = uniform_levels(bits, c) if kind == "uniform" else power_of_two_levels(bits, c)
        thresholds = torch.tensor([float(a + b) / 2 for a, b in itertools.pairwise(levels)])
        x = torch.cat([thresholds[::5], normal(60) * float(c), torch.tensor([1e30, -1e30])])
        expected = [nearest_fraction(v, levels) for v in x.tolist()]
        assert [Fraction(v) for v in quantizer(x).tolist()] == expected


def test_uniform_levels_at_8_bits_are_the_int8_grid():
    quantizer = DDQuantizer(1, 8, kind="uniform")
    values = values_in_force(quantizer).double()
    assert torch.equal(values / values.max() * 127, torch.arange(-128.0, 128).double())


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_power_of_two_levels_beyond_4_bits_are_those_at_4(bits):
    """Eqn (2) halves its smallest step 2^(b - 1) - 1 times; an 8-bit grid around 0 holds no part below 2^-7."""
    quantizers = [DDQuantizer(1, s, kind="power_of_two") for s in (4, bits)]
    four, more = (values_in_force(q).unique() for q in quantizers)
    assert torch.equal(four, more)


@pytest.mark.parametrize("kind", ["uniform", "power_of_two"])
def test_the_clipping_threshold_gets_the_derivative_of_eqn_1_and_eqn_2(kind):
    """With the selection held every level is c times a constant: d x_q / d log2 c = ln 2 (x_q - x), beyond the ends ln 2 x_q."""
    quantizer = DDQuantizer(1, 4, kind=kind)
    x, grad = normal(1000), normal(1000, seed=1)
    out = quantizer(x)
    (found,) = torch.autograd.grad(out, quantizer.log2_clip, grad)
    inside = (x >= out.min()) & (x <= out.max())
    expected = float(grad.double() @ (out.detach().double() - x.double() * inside)) * math.log(2)
    assert float(found) == pytest.approx(expected, rel=2**-11)  # to the 12 bits of the scale

    def held(log2_clip: float) -> float:
        levels = uniform_levels if kind == "uniform" else power_of_two_levels
        values = torch.tensor(
            [float(v) for v in levels(4, Fraction(2.0**log2_clip))], dtype=torch.float64
        )
        line = x.double() * inside * 2.0**log2_clip  # x goes along with the levels at either side
        return float(grad.double() @ (values[oracle.nearest(x, values / 2.0**log2_clip)] - line))

    slope = (held(1e-4) - held(-1e-4)) / 2e-4  # the oracle's finite difference
    assert float(found) == pytest.approx(slope, rel=2**-10)


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
    with pytest.raises(ValueError, match="1 to 8 are possible"):
        DDQuantizer(1, max_bits)


# ---- indices


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
        expected = values[
            oracle.nearest(part.double(), values)
        ]  # among equal levels any index will do
        assert torch.equal(values[index.long()], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_nearest_level_are_refused_by_a_sentence(bad):
    x = normal(4, 6)
    quantizer = DDQuantizer.from_tensor(x, 4, channel_axis=0)
    x[2, 3] = bad
    with pytest.raises(DDQError, match=r"1 of 24 values .* NaN or infinite"):
        quantizer.indices(x)
    with pytest.raises(DDQError, match="1 of 24 values"):
        quantizer.refit(x, 2)
    with pytest.raises(DDQError, match="1 of 24 values"):
        DDQuantizer.from_tensor(x, 4)


# ---- how levels start and are re-centred


@few
@given(st.lists(st.floats(0, 255), min_size=1, max_size=16), st.integers(0, 4))
def test_spread_runs_keeps_the_fitted_levels_as_the_means_of_runs(fitted, doublings):
    fitted = np.sort(np.resize(fitted, 2 ** (len(fitted) - 1).bit_length()))
    run = 2**doublings
    spread = spread_levels(fitted, len(fitted) * run)
    np.testing.assert_allclose(spread.reshape(-1, run).mean(1), fitted, atol=1e-9)
    assert (np.diff(spread) >= -1e-9).all()
    assert spread.min() >= -1e-9
    assert spread.max() <= 255 + 1e-9


@pytest.mark.parametrize("shape", ["gaussian", "laplace", "shifted", "positive"])
@pytest.mark.parametrize("s", range(1, 8))
def test_refit_leaves_lloyd_max_levels_at_its_bits_and_sensible_ones_at_others(s, shape):
    x = normal(4000, seed=s)
    x = {"gaussian": x, "laplace": x * x.abs(), "shifted": x * 0.1 + 5, "positive": x.relu()}[shape]
    quantizer = DDQuantizer.from_tensor(x, 8)
    quantizer.refit(x, s)
    assert quantizer.bits == (s,)
    fitted = lloyd_max(Histogram.of(x.numpy()), 2**s)
    scale = float(quantizer.scale)
    np.testing.assert_allclose(values_in_force(quantizer), fitted, atol=scale * 0.501)
    for other in {max(1, s - 1), s + 1}:  # a gate may close or open before the next refit
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
def test_channels_are_fitted_as_tensors_of_their_own(kind, axis):
    x = normal(3, 3, 50) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    x = x.transpose(0, axis)
    together = DDQuantizer.from_tensor(x, 4, 3, kind=kind, channel_axis=axis)
    alone = [DDQuantizer.from_tensor(part, 4, 3, kind=kind)(part) for part in x.unbind(axis)]
    assert torch.equal(together(x), torch.stack(alone, axis))


@few
@given(
    st.floats(-(2.0**126), 2.0**126, width=32),
    st.floats(-(2.0**126), 2.0**126, width=32),
)
def test_the_fitting_grid_holds_zero_and_the_whole_range(a, b):
    low, high = min(a, b), max(a, b)
    scale, zero_point = fit_grid(Histogram.of(np.array([low, high])))
    assert isinstance(zero_point, int)
    assert 0 <= zero_point <= 255
    assert -zero_point * scale <= low + scale / 2
    assert (255 - zero_point) * scale >= high - scale / 2


@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.25, 1e-38, -4e37])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constant_tensors_are_kept_to_a_hundredth(kind, value, bits):
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


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
def test_the_error_curve_tells_what_a_refit_leaves(kind, sparse):
    x = normal(20_000)
    if sparse:
        x[2000:] = 0
    curve = squared_error_by_bits(
        Histogram.of(x.numpy()), range(1, MAX_BITS_BY_KIND[kind] + 1), kind
    )
    for s in curve:
        quantizer = DDQuantizer.from_tensor(x, s, kind=kind)
        assert curve[s] == pytest.approx(squared_error(quantizer, x), rel=0.05)


def test_gradient_correction_draws_the_outer_level_to_the_weights_beyond_it():
    """Weights outside the levels get no gradient; it is the levels that come to fetch them."""
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


# ---- gates and state


@few
@given(
    st.lists(st.integers(1, 6), min_size=4, max_size=4),
    st.sampled_from([1.0, 1e-8, 0.0]),
    st.booleans(),
)
def test_gates_read_back_give_the_bits_that_were_set(bits, logit, opened_before):
    x = normal(4, 20)
    quantizer = DDQuantizer.from_tensor(x, 6, channel_axis=0)
    quantizer.gate_logits.data.fill_(logit if opened_before else -logit)
    quantizer.refit(x, tuple(bits))
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
def test_a_saved_quantizer_returns_as_it_was(kind):
    x = normal(3, 40)
    quantizer = DDQuantizer.from_tensor(x, 4, kind=kind, channel_axis=0)
    quantizer.refit(x, (1, 2, 4))
    other = DDQuantizer(3, 4, kind=kind)
    other.load_state_dict(quantizer.state_dict())
    other.update_bits()
    assert other.bits == (1, 2, 4)
    assert torch.equal(other(x), quantizer(x))


@pytest.mark.parametrize(("kind", "learned"), [("learned", {"levels"}), ("uniform", {"log2_clip"})])
def test_only_what_the_kind_learns_is_trained(kind, learned):
    quantizer = DDQuantizer.from_tensor(normal(50), 4, kind=kind)
    assert {name for name, p in quantizer.named_parameters() if p.requires_grad} == learned
    quantizer(normal(50)).square().sum().backward()
    assert {
        name for name, p in quantizer.named_parameters() if p.grad is not None and p.grad.any()
    } == learned
