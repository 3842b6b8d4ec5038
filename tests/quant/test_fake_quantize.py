"""Values of fake_quantize against Eqn (3), the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import LEVELS, few, quantize, quantize_one, scales, seeded, seeds
from torch import Tensor

from ddqcli.quant.fake_quantize import fake_quantize, fake_quantize_many
from ddqcli.quant.grid import representable_scale
from ddqcli.quant.levels import effective_levels
from ddqcli.quant.lookup import make_lookup_tables


@pytest.mark.parametrize("kind", LEVELS)
def test_every_decision_on_the_grid_is_that_of_eqn_3(kind):
    for b, s in oracle.all_bits():
        rng = seeded(b * 8 + s)
        levels = LEVELS[kind](rng, 2**b)
        scale = float(representable_scale(torch.rand((), generator=rng)))
        zero = int(torch.randint(0, 256, (), generator=rng))
        x = oracle.edge_cases(scale, zero)
        expected = oracle.quantize(x, levels, s, scale, zero).float()
        assert oracle.same_bits(quantize_one(x, levels, s, scale, zero), expected), (b, s)


@few
@given(
    seeds,
    st.sampled_from(oracle.all_bits()),
    st.sampled_from(list(LEVELS)),
    scales,
    st.integers(0, 255),
)
def test_eqn_3_at_any_scale_and_zero_point(seed, bits, kind, scale, zero):
    b, s = bits
    levels = LEVELS[kind](seeded(seed), 2**b)
    x = torch.cat(
        [oracle.edge_cases(scale, zero), torch.randn(300, generator=seeded(seed)) * 80 * scale]
    )
    assert oracle.same_bits(
        quantize_one(x, levels, s, scale, zero), oracle.quantize(x, levels, s, scale, zero).float()
    )


@few
@given(
    st.lists(st.floats(-50, 300, width=32), min_size=16, max_size=16),
    st.integers(1, 4),
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=20),
    scales,
    st.integers(0, 255),
)
def test_eqn_3_for_any_levels_and_any_values(levels, s, x, scale, zero):
    levels, x = torch.tensor(levels), oracle.flushed(torch.tensor(x, dtype=torch.float32), scale)
    assert oracle.same_bits(
        quantize_one(x, levels, s, scale, zero), oracle.quantize(x, levels, s, scale, zero).float()
    )


def test_a_quotient_that_underflows_counts_as_zero():
    levels = torch.tensor([0.0, 20.0])  # the threshold is the value 0
    x = torch.tensor([-1e-45, 0.0, 1e-45])
    assert quantize_one(x, levels, 1, 4096.0, 10).sign().tolist() == [1, 1, 1]
    assert quantize_one(x, levels, 1, 1.0, 10).sign().tolist() == [-1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("b", "s"), [(1, 1), (4, 2), (4, 4), (8, 3), (8, 8)])
def test_half_precision_takes_the_level_nearest_to_its_exact_value(dtype, b, s):
    levels = LEVELS["anywhere"](seeded(s), 2**b)
    for scale, zero in ((2.0**-6, 128), (float(representable_scale(torch.tensor(0.013))), 40)):
        # Without the last values, which float16 cannot hold.
        x = oracle.edge_cases(scale, zero)[:-4].to(dtype)
        expected = oracle.quantize(x.double(), levels, s, scale, zero).float().to(dtype)
        assert oracle.same_bits(quantize_one(x, levels, s, scale, zero), expected)


@few
@given(
    seeds,
    st.integers(1, 8).flatmap(
        lambda b: st.tuples(st.just(b), st.lists(st.integers(1, b), min_size=2, max_size=5))
    ),
    st.integers(0, 2),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_group_has_its_own_levels_gates_and_grid(seed, bits, axis, dtype):
    b, bits = bits[0], tuple(bits[1])
    rng, groups = seeded(seed), len(bits)
    levels = torch.rand(groups, 2**b, generator=rng) * 300 - 20
    scale = representable_scale(
        torch.rand(groups, generator=rng) * 10.0 ** torch.randint(-9, 9, (groups,), generator=rng)
    )
    zero = torch.randint(0, 256, (groups,), generator=rng).float()
    shape = [4, 3, 5]
    shape[axis] = groups
    along = [1, 1, 1]
    along[axis] = groups
    # On half-steps of the grid, half of them moved off.
    x = (torch.randint(-3, 514, shape, generator=rng) / 2 - zero.view(along)) * scale.view(along)
    x = (x * (1 + torch.randint(0, 2, shape, generator=rng) * 1e-7)).to(dtype)
    out = quantize(x, levels, scale, zero, torch.ones(groups, b), bits, axis=axis)
    expected = oracle.quantize_groups(x.double(), levels, bits, scale, zero, axis).float().to(dtype)
    assert oracle.same_bits(out, expected)


def test_constant_tensors_take_one_level():
    levels = torch.tensor([0.0, 10, 20, 30])
    out = quantize_one(torch.full((3, 5), 0.3), levels, 2, 2.0**-7, 0)
    assert out.unique().numel() == 1


@few
@given(seeds, st.sampled_from(oracle.all_bits()), st.sampled_from(list(LEVELS)))
def test_outputs_are_members_of_the_level_set_bit_for_bit(seed, bits, kind):
    b, s = bits
    levels, x = LEVELS[kind](seeded(seed), 2**b), torch.randn(500, generator=seeded(seed))
    scale = float(representable_scale(torch.tensor(0.013)))
    members = ((effective_levels(levels[None], (s,))[0] - 100) * scale).view(torch.int32)
    assert bool(torch.isin(quantize_one(x, levels, s, scale, 100).view(torch.int32), members).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [(2,), (1, 2, 2)])
def test_values_that_are_not_finite_become_nan(bad, dtype, bits):
    groups = len(bits)
    x = torch.randn(3, 40, generator=seeded(0)).to(dtype)
    x[1, 7] = bad
    x.requires_grad_()
    levels, one = torch.tensor([[0.0, 10, 20, 30]] * groups).requires_grad_(), torch.ones(groups)
    out = quantize(x, levels, one, 15 * one, torch.ones(groups, 2), bits)
    assert torch.equal(out.isnan(), x.isnan() | x.isinf())  # the loss shows it
    out.sum().backward()


def test_several_tensors_together_get_what_each_gets_alone():
    """Values and gradients, each with its own levels, bits and correction."""
    rng, bits, corrections = seeded(4), (2, 4, 3), [0.0, 0.7, 0.1]
    levels, gates = torch.rand(3, 16, generator=rng) * 255, torch.ones(3, 4)
    scale = representable_scale(torch.rand(3, generator=rng) / 50)
    zero = torch.tensor([128.0, 100, 150])
    xs = [torch.randn(shape, generator=rng) for shape in ((40, 3), (7,), (5, 2, 3))]
    grads = [torch.randn(x.shape, generator=rng) for x in xs]

    def together(inputs: list[Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
        tables = make_lookup_tables(inputs[0], inputs[1], zero, inputs[2], bits)
        return fake_quantize_many(x, tables, corrections)

    def alone(inputs: list[Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
        rows = [slice(g, g + 1) for g in range(3)]
        tables = [
            make_lookup_tables(*(t[r] for t in (*inputs[:2], zero, inputs[2])), (s,))
            for r, s in zip(rows, bits, strict=True)
        ]
        each = zip(x, tables, corrections, strict=True)
        return tuple(fake_quantize(one, table, correction=c) for one, table, c in each)

    results = []
    for way in (together, alone):
        inputs = [t.clone().requires_grad_() for t in (levels, scale, gates)]
        x = [t.clone().requires_grad_() for t in xs]
        out = way(inputs, x)
        results.append([*out, *torch.autograd.grad(out, [*inputs, *x], grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_whose_result_is_not_used_gets_no_gradient():
    xs = [torch.randn(5).requires_grad_() for _ in range(2)]
    tables = make_lookup_tables(
        torch.rand(2, 4) * 255, torch.ones(2), torch.zeros(2), torch.ones(2, 2), (2, 2)
    )
    fake_quantize_many(xs, tables, [0.0, 0.0])[1].sum().backward()
    assert xs[0].grad is None
    assert xs[1].grad is not None


def test_only_x_is_saved_for_the_backward_pass_in_its_size():
    sizes = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    levels = (torch.rand(1, 16) * 255).requires_grad_()
    x = torch.randn(5000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        quantize(x, levels, torch.ones(1), torch.zeros(1), torch.ones(1, 4), (4,))
    assert [size for size in sizes if size >= x.numel()] == [x.numel()]
