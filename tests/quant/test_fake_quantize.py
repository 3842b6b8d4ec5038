"""The fast path of Eqn (3) and its gradients against the float64 oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddqcli.quant import fake_quantize as functional
from ddqcli.quant.compiled import can_compile
from ddqcli.quant.grid import representable_scale
from ddqcli.quant.levels import effective_levels
from ddqcli.quant.lookup import make_lookup_tables

few = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
scales = st.builds(lambda m, e: m * 2.0**e, st.integers(2048, 4095), st.integers(-111, 107))
LEVELS = {
    "anywhere": lambda rng, n: torch.rand(n, generator=rng) * 255,
    "beyond the grid": lambda rng, n: torch.randn(n, generator=rng) * 200 + 100,
    "coinciding": lambda rng, n: torch.randint(0, 4, (n,), generator=rng) * 60.0,
    "half steps": lambda rng, n: torch.randint(-4, 514, (n,), generator=rng) / 2,
    "all equal": lambda rng, n: torch.full((n,), 77.0),
}


def fake_quantize(
    x: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, gates: Tensor, bits: tuple, **options
) -> Tensor:
    """Eqn (3) from its parameters."""
    return functional.fake_quantize(
        x, make_lookup_tables(levels, scale, zero, gates, bits), **options
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(
    x: Tensor, levels: Tensor, bits: tuple[int, ...] | int, scale: float, zero: float, **options
) -> Tensor:
    """fake_quantize for one group."""
    gates = options.pop("gates", torch.ones(1, (len(levels) - 1).bit_length()))
    return fake_quantize(
        x,
        levels[None],
        torch.tensor([scale]),
        torch.tensor([float(zero)]),
        gates,
        (bits,),
        **options,
    )


# ---- forward


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(("b", "s"), oracle.all_bits())
def test_every_decision_of_the_grid_is_that_of_eqn_3(b, s, kind):
    rng = seeded(b * 8 + s)
    levels = LEVELS[kind](rng, 2**b)
    scale, zero = (
        float(representable_scale(torch.rand((), generator=rng))),
        int(torch.randint(0, 256, (), generator=rng)),
    )
    x = oracle.edge_cases(scale, zero)
    assert oracle.same_bits(
        apply(x, levels, s, scale, zero), oracle.quantize(x, levels, s, scale, zero).float()
    )


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
        apply(x, levels, s, scale, zero), oracle.quantize(x, levels, s, scale, zero).float()
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
        apply(x, levels, s, scale, zero), oracle.quantize(x, levels, s, scale, zero).float()
    )


def test_a_mean_is_rounded_as_it_is_and_not_as_float32_sums_it():
    """127 levels at 101.5 and one a hair below: the mean lies below the tie, and 128 terms in float32 would lose that."""
    levels = torch.full((128,), 101.5)
    levels[5] = torch.tensor(101.5).nextafter(torch.tensor(0.0))
    levels = torch.cat([levels, torch.full((128,), 200.0)])
    assert effective_levels(levels[None], (1,))[0].tolist() == [101, 200]


def test_a_quotient_that_underflows_counts_as_zero():
    levels = torch.tensor([0.0, 20.0])  # the threshold is the value 0
    x = torch.tensor([-1e-45, 0.0, 1e-45])
    assert apply(x, levels, 1, 4096.0, 10).sign().tolist() == [1, 1, 1]
    assert apply(x, levels, 1, 1.0, 10).sign().tolist() == [-1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("b", "s"), [(1, 1), (4, 2), (4, 4), (8, 3), (8, 8)])
def test_half_precision_takes_the_level_nearest_to_its_exact_value(dtype, b, s):
    levels = LEVELS["anywhere"](seeded(s), 2**b)
    for scale, zero in ((2.0**-6, 128), (float(representable_scale(torch.tensor(0.013))), 40)):
        x = oracle.edge_cases(scale, zero)[:-4].to(
            dtype
        )  # without the values that float16 cannot hold
        expected = oracle.quantize(x.double(), levels, s, scale, zero).float().to(dtype)
        assert oracle.same_bits(apply(x, levels, s, scale, zero), expected)


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
    grid = (
        torch.randint(-3, 514, shape, generator=rng) / 2
    )  # on half-steps of the grid, half of them moved off
    along = [1, 1, 1]
    along[axis] = groups
    x = (
        (grid - zero.view(along))
        * scale.view(along)
        * (1 + torch.randint(0, 2, shape, generator=rng) * 1e-7)
    )
    x = x.to(dtype)
    found = fake_quantize(x, levels, scale, zero, torch.ones(groups, b), bits, axis=axis)
    expected = oracle.quantize_groups(x.double(), levels, bits, scale, zero, axis).float().to(dtype)
    assert oracle.same_bits(found, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "every second", "half of the channels", "expanded"]
)
def test_the_layout_in_memory_changes_neither_values_nor_gradients(axis, layout):
    x = torch.randn(4, 4, 6, 6, generator=seeded(0))
    strange = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": torch.stack([x, -x], dim=-1)[..., 0],
        "half of the channels": torch.cat([x, x], 1)
        .contiguous(memory_format=torch.channels_last)
        .chunk(2, 1)[0],
        "expanded": x[:, :, :1].expand(4, 4, 6, 6),
    }[layout]
    plain, strange = strange.contiguous().requires_grad_(), strange.detach().requires_grad_()
    for bits in ((3,), (1, 2, 3, 4)):
        groups = len(bits)
        levels = (torch.rand(groups, 16, generator=seeded(1)) * 255).requires_grad_()
        scale = representable_scale(torch.full((groups,), 0.02))
        zero, gates = torch.full((groups,), 128.0), torch.ones(groups, 4)
        grad = torch.randn(4, 4, 6, 6, generator=seeded(2)).contiguous(
            memory_format=torch.channels_last
        )
        results = []
        for tensor in (plain, strange):
            out = fake_quantize(tensor, levels, scale, zero, gates, bits, axis=axis, correction=0.1)
            results.append((out, *torch.autograd.grad(out, (tensor, levels), grad)))
        (out, grad_x, grad_levels), (out_2, grad_x_2, grad_levels_2) = results
        assert torch.equal(out, out_2)
        assert torch.equal(grad_x, grad_x_2)
        torch.testing.assert_close(
            grad_levels, grad_levels_2, rtol=1e-5, atol=1e-6
        )  # summed in the order of the memory


@pytest.mark.parametrize(
    ("shape", "groups", "axis"),
    [
        ((0,), 1, 0),
        ((3, 0), 1, 0),
        ((3, 0), 3, 0),
        ((0, 3, 2), 3, 1),
        ((2, 3, 0, 0), 3, 1),
        ((), 1, 0),
        ((1,), 1, 0),
    ],
)
def test_empty_and_scalar_tensors_keep_their_shape(shape, groups, axis):
    x = torch.full(shape, -1.0).requires_grad_()  # below all levels
    levels = torch.arange(4.0).repeat(groups, 1).requires_grad_()
    one = torch.ones(groups)
    out = fake_quantize(
        x, levels, one, 0 * one, torch.ones(groups, 2), (2,) * groups, axis=axis, correction=1.0
    )
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert torch.equal(
        levels.grad.sum(), torch.tensor(2.0 * x.numel())
    )  # Eqn (8) and, for the distance of 1, Eqn (9)


def test_constant_tensors_take_one_level():
    out = apply(
        torch.full((3, 5), 0.3),
        torch.tensor([0.0, 10, 20, 30]),
        2,
        float(representable_scale(torch.tensor(0.01))),
        0,
    )
    assert out.unique().numel() == 1


@few
@given(seeds, st.sampled_from(oracle.all_bits()), st.sampled_from(list(LEVELS)))
def test_outputs_are_members_of_the_level_set_bit_for_bit(seed, bits, kind):
    b, s = bits
    levels, x = LEVELS[kind](seeded(seed), 2**b), torch.randn(500, generator=seeded(seed))
    scale = float(representable_scale(torch.tensor(0.013)))
    stored = effective_levels(levels[None], (s,))[0]
    assert torch.equal(stored, oracle.effective(levels, s).float())
    assert stored.tolist() == sorted(k for k in stored.tolist() if 0 <= k <= 255 and k == int(k))
    members = ((stored - 100) * scale).view(torch.int32)
    assert bool(torch.isin(apply(x, levels, s, scale, 100).view(torch.int32), members).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [(2,), (1, 2, 2)])
def test_no_level_stands_for_a_value_that_is_not_finite(bad, dtype, bits):
    groups = len(bits)
    x = torch.randn(3, 40, generator=seeded(0)).to(dtype)
    x[1, 7] = bad
    x.requires_grad_()
    levels, one = torch.tensor([[0.0, 10, 20, 30]] * groups).requires_grad_(), torch.ones(groups)
    out = fake_quantize(x, levels, one, 15 * one, torch.ones(groups, 2), bits)
    assert torch.equal(out.isnan(), x.isnan() | x.isinf())  # the loss shows it
    out.sum().backward()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("correction", [0.0, 0.1])
@pytest.mark.parametrize("bits", [(4,), (1,), (6,), (2, 3, 1)], ids=str)
def test_fused_kernels_decide_as_the_others_do(bits, correction, gated, monkeypatch):
    """The compiled kernels against the eager ones, which the oracle has checked: values bit for bit, sums in another order."""
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile finds no compiler here")
    monkeypatch.setattr(functional, "MANY", 1)
    groups = len(bits)
    levels = (torch.rand(groups, 64, generator=seeded(0)) * 255).requires_grad_()
    scale, zero = (
        representable_scale(torch.full((groups,), 0.03)).requires_grad_(),
        torch.full((groups,), 100.0),
    )
    gates = torch.ones(groups, 6, requires_grad=gated)
    learned = (levels, scale, gates) if gated else (levels, scale)
    x = torch.cat(
        [
            oracle.edge_cases(float(scale[0].detach()), 100),
            torch.randn(3000, generator=seeded(1)) * 3,
        ]
    )
    x = x[x.abs() < 1e4]  # further out, corrections would drown the sums
    x = x[: len(x) // 3 * 3].view(3, -1).requires_grad_()
    grad = torch.randn(x.shape, generator=seeded(2))
    results = []
    for use_compiled in (False, True):
        out = fake_quantize(
            x, levels, scale, zero, gates, bits, correction=correction, use_compiled=use_compiled
        )
        results.append((out, *torch.autograd.grad(out, (x, *learned), grad)))
    (out, grad_x, *of_learned), (fused_out, fused_grad_x, *fused_of_learned) = results
    assert oracle.same_bits(fused_out, out)
    assert torch.equal(fused_grad_x, grad_x)
    for found, expected in zip(fused_of_learned, of_learned, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    bad = x.detach().clone()
    bad[1, 7], bad[2, 9] = torch.nan, torch.inf
    found = fake_quantize(bad, levels, scale, zero, gates, bits, use_compiled=True)
    assert found.isnan().nonzero().tolist() == [[1, 7], [2, 9]]


def test_several_tensors_at_once_get_what_each_gets_alone():
    """Values and gradients, each with its own levels, bits and correction."""
    rng, bits, corrections = seeded(4), (2, 4, 3), [0.0, 0.7, 0.1]
    levels, gates = torch.rand(3, 16, generator=rng) * 255, torch.ones(3, 4)
    scale, zero = (
        representable_scale(torch.rand(3, generator=rng) / 50),
        torch.tensor([128.0, 100, 150]),
    )
    xs = [torch.randn(shape, generator=rng) for shape in ((40, 3), (7,), (5, 2, 3))]
    grads = [torch.randn(x.shape, generator=rng) for x in xs]

    def together(inputs: list[Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
        tables = make_lookup_tables(inputs[0], inputs[1], zero, inputs[2], bits)
        return functional.fake_quantize_many(x, tables, corrections)

    def alone(inputs: list[Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
        rows = [slice(g, g + 1) for g in range(3)]
        tables = [
            make_lookup_tables(*(t[r] for t in (*inputs[:2], zero, inputs[2])), (s,))
            for r, s in zip(rows, bits, strict=True)
        ]
        each = zip(x, tables, corrections, strict=True)
        return tuple(functional.fake_quantize(one, table, correction=c) for one, table, c in each)

    results = []
    for way in (together, alone):
        inputs = [t.clone().requires_grad_() for t in (levels, scale, gates)]
        x = [t.clone().requires_grad_() for t in xs]
        out = way(inputs, x)
        results.append([*out, *torch.autograd.grad(out, [*inputs, *x], grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ---- the level grid


@few
@given(st.floats(2.0**-100, 2.0**119, width=32))
def test_representable_rounds_up_to_twelve_significant_bits(scale):
    found = float(representable_scale(torch.tensor(scale)))
    mantissa = torch.frexp(torch.tensor(found, dtype=torch.float64)).mantissa * 4096
    assert mantissa == mantissa.round()
    assert scale <= found < scale * (1 + 2.0**-10)
    assert float(representable_scale(torch.tensor(found))) == found


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-35, 1e38, 3.4e38])
def test_levels_stay_finite_and_distinct_at_extreme_scales(scale):
    step = representable_scale(torch.tensor([scale]))
    values = (torch.arange(256.0) - 128) * step
    assert bool(values.isfinite().all())
    assert values.unique().numel() == 256


# ---- gradients


def selections(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, n], float64: x_q as shares of the values, and x as shares of the two at either side of it, none outside."""
    values, x = values.double(), x.double()
    line = torch.zeros(len(x), len(values), dtype=torch.float64)
    for i, value in enumerate(x):
        above = int((values <= value).sum())
        if 0 < above < len(values):
            low, high = values[above - 1], values[above]
            line[i, above - 1], line[i, above] = (
                (high - value) / (high - low),
                (value - low) / (high - low),
            )
        elif value == values[-1]:
            line[i, -1] = 1
    return oracle.one_hot(oracle.nearest(x, values), len(values)), line


def literal(
    x: Tensor,
    levels: Tensor,
    bits: int,
    scale: Tensor,
    zero: float,
    grad: Tensor,
    correction: float,
) -> tuple[Tensor, list[Tensor]]:
    """Eqn (3), and the gradients of levels and scale: x_q less the straight line, and Eqn (9) on x_q alone.

    The selection is held, and R's gradient passes straight through.
    """
    inputs = levels.double().requires_grad_(), scale.double().requires_grad_()
    exact, rounded = oracle.averaged(inputs[0], bits), oracle.effective(levels, bits)
    values = (rounded + exact - exact.detach() - zero) * inputs[1]
    x_o, line = selections(x, values.detach())
    x_q = x_o @ values
    task = grad.double() @ (x_q - line @ values) + correction * (x_q.detach() - x.double()) @ x_q
    return x_q, list(torch.autograd.grad(task, inputs))


def separate(seed: int, b: int, s: int) -> tuple[Tensor, Tensor]:
    """Shuffled levels whose means are distinct, and values of which none lies on a level (a tie between duplicates)."""
    rng = seeded(seed)
    centres = (torch.randperm(120, generator=rng)[: 2**s].sort().values * 2 + 1.0)[:, None]
    offsets = torch.linspace(-0.9, 0.9, 2 ** (b - s) + 2)[1:-1] if b > s else torch.zeros(1)
    levels = (centres + (offsets - offsets.mean())).view(-1)
    return levels[torch.randperm(2**b, generator=rng)], torch.randint(
        -30, 290, (400,), generator=rng
    ) + 0.3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("correction", [0.0, 0.37])
@pytest.mark.parametrize(("b", "s"), [(b, s) for b, s in oracle.all_bits() if s < 7])
def test_level_and_scale_gradients_are_those_of_the_literal_formula(b, s, correction, gated):
    levels, x = separate(b * 8 + s, b, s)
    zero, scale = 90.0, torch.tensor([0.03125])
    x, grad = (x - zero) * scale, torch.randn(400, generator=seeded(s))
    inputs = levels.clone().requires_grad_(), scale.clone().requires_grad_()
    gates = torch.ones(1, b, requires_grad=gated)
    out = fake_quantize(
        x, inputs[0][None], inputs[1], torch.tensor([zero]), gates, (s,), correction=correction
    )
    found = torch.autograd.grad(out, inputs, grad)
    x_q, expected = literal(x, levels, s, scale, zero, grad, correction)
    assert torch.equal(x_q.float(), out)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("b", "s"), [(b, s) for b, s in oracle.all_bits() if b <= 5])
def test_level_gradients_are_finite_differences_of_the_oracle(b, s):
    """Moving one stored level by Z_U grid steps moves its run's mean by one step, exactly; x goes along on its straight line."""
    run, scale, zero = 2 ** (b - s), 0.25, 100.0
    spacing = 250 // 2**s
    centres = torch.arange(2**s) * spacing + spacing // 2
    levels = centres.repeat_interleave(run).float()[torch.randperm(2**b, generator=seeded(b))]
    x = (
        torch.cat([centres - 0.4, centres + 0.4]).repeat(3) - zero
    ) * scale  # far from every threshold
    grad = torch.randn(len(x), generator=seeded(s)).double()
    parameter = levels.clone().requires_grad_()
    out = apply(x, parameter, s, scale, zero)
    (found,) = torch.autograd.grad(out, parameter, grad.float())
    before = ((oracle.effective(levels, s) - zero) * scale).numpy()
    outside = torch.from_numpy((x.numpy() < before[0]) | (x.numpy() > before[-1]))

    def task(levels: Tensor) -> float:
        line = np.interp(x.numpy(), before, ((oracle.effective(levels, s) - zero) * scale).numpy())
        return float(
            grad
            @ (
                oracle.quantize(x, levels, s, scale, zero)
                - torch.from_numpy(line).where(~outside, 0)
            )
        )

    for k in range(2**b):
        step = torch.zeros(2**b)
        step[k] = run
        difference = (task(levels + step) - task(levels - step)) / (2 * run)
        assert float(found[k]) == pytest.approx(difference, rel=1e-4, abs=1e-4)


def test_levels_that_move_with_the_values_are_not_counted_twice():
    """Where values lie densely, shifting inner levels leaves the sum of x_q as it is; by Eqn (8) each member adds to it."""
    levels, x = torch.tensor([10.0, 60, 130, 180]), torch.linspace(10, 180, 5441)

    def total(levels: Tensor) -> float:
        return float(oracle.quantize(x, levels, 2, 1.0, 0.0).sum())

    parameter = levels.clone().requires_grad_()
    apply(x, parameter, 2, 1.0, 0.0).sum().backward()
    inner = torch.tensor([0.0, 1, 1, 0])
    truth = (total(levels + inner) - total(levels - inner)) / 2
    assert float(parameter.grad @ inner) == pytest.approx(truth, abs=20)
    assert int(((x >= 35) & (x < 155)).sum()) > 100 * abs(truth)  # the members


@few
@given(seeds, st.sampled_from([2, 3, 5, 8]))
def test_the_step_of_even_levels_has_the_gradient_of_lsq(seed, bits):
    """Esser et al. 2020, Eqn (3): round(x / s) - x / s within the range, the end's code beyond it."""
    x, grad = torch.randn(300, generator=seeded(seed)), torch.randn(300, generator=seeded(seed + 1))
    half = 2 ** (bits - 1)
    scale = 2.0 / half  # which leaves some values beyond the range
    step, codes = torch.tensor([scale], requires_grad=True), torch.arange(-half, half)[None] + 128.0
    out = fake_quantize(x, codes, step, torch.tensor([128.0]), torch.ones(1, bits), (bits,))
    (found,) = torch.autograd.grad(out, step, grad)
    v = x.double() / scale
    inside = (v >= -half) & (v <= half - 1)
    expected = float(grad.double() @ (v.clamp(-half, half - 1).round() - v * inside))
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_gates_of_huge_values_get_finite_gradients():
    x, gates = torch.tensor([3e38, 3e38, 1.0]), torch.ones(1, 2, requires_grad=True)
    apply(x, torch.tensor([0.0, 10, 20, 30]), 2, 1.0, 0.0, gates=gates).sum().backward()
    assert torch.equal(gates.grad, torch.tensor([[0.0, 5.0]]))


def test_a_level_that_stands_alone_and_a_mean_of_many_move_equally_fast():
    """Eqn (8)'s 1 / Z_U, shared over the run: the run's mean gets 1 / Z_U of its members' sum for each of Z_U levels."""
    x, grads = torch.zeros(10), []
    for b in (1, 5):
        levels = torch.tensor([-20.0, 20]).repeat_interleave(2 ** (b - 1)).requires_grad_()
        apply(x, levels, 1, 1.0, 0.0).sum().backward()
        grads.append(levels.grad.view(2, -1).sum(1))
    assert torch.equal(*grads)


@few
@given(seeds, st.sampled_from(oracle.all_bits()), st.floats(0, 2))
def test_the_gradient_of_x_passes_exactly_between_the_outer_levels(seed, bits, correction):
    b, s = bits
    levels = LEVELS["anywhere"](seeded(seed), 2**b)
    x = oracle.edge_cases(0.5, 77).requires_grad_()
    grad = torch.randn(x.shape, generator=seeded(seed))
    values = (oracle.effective(levels, s) - 77) * 0.5
    out = apply(x, levels, s, 0.5, 77, correction=correction)
    (found,) = torch.autograd.grad(out, x, grad)
    inside = (x.detach().double() >= values[0]) & (x.detach().double() <= values[-1])
    assert torch.equal(found, torch.where(inside, grad, 0.0))  # Eqn (9) does not reach x


def gate_case(seed: int, b: int, s: int) -> Tensor:
    """Levels [2^b], shuffled, with whole numbers at s + 1 bits and as the means of their pairs: nothing is rounded there."""
    rng = seeded(seed)
    whole = torch.randperm(64, generator=rng)[: 2 ** min(b, s + 1)].sort().values * 4.0
    halves = whole.view(-1, 2)
    if s < b:
        halves[:, 1] = halves[:, 0] + 2 * torch.randint(0, 2, (len(halves),), generator=rng)
    levels = halves.reshape(-1).repeat_interleave(max(1, 2 ** (b - s - 1)))
    return levels[torch.randperm(2**b, generator=rng)]


@pytest.mark.parametrize("correction", [0.0, 0.5])
@pytest.mark.parametrize(("b", "s"), [(b, s) for b, s in oracle.all_bits() if s <= 5])
def test_gate_gradients_are_the_change_of_eqn_3_when_a_gate_closes_or_opens(b, s, correction):
    """Finite differences of the oracle with the selection held: the pair's mean for closing, the nearer child for opening."""
    levels, scale, zero = gate_case(b * 8 + s, b, s), 0.125, 31.0
    x = (torch.randint(-40, 600, (500,), generator=seeded(b)) / 2 - zero) * scale
    grad = torch.randn(500, generator=seeded(s))
    gates = torch.ones(1, b, requires_grad=True)
    out = apply(x, levels, s, scale, zero, gates=gates, correction=correction)
    (found,) = torch.autograd.grad(out, gates, grad)

    def values(at: int) -> Tensor:
        return (oracle.effective(levels, at) - zero) * scale

    index = oracle.nearest(x, values(s))
    now = values(s)[index]
    task = grad.double() + correction * (now - x.double())
    expected = torch.zeros(b, dtype=torch.float64)
    expected[s - 1] = task @ (now - values(s - 1)[index // 2])
    if s < b:
        children = values(s + 1).view(-1, 2)[index]
        nearer = torch.where(x.double() >= children.mean(1), children[:, 1], children[:, 0])
        expected[s] = task @ (nearer - now)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-3)


def test_values_below_the_grid_belong_to_the_lower_half_of_a_level_on_its_edge():
    """Opening a gate splits level 0 into 0 and 4: a value below both stays at 0, one between them goes up by 4."""
    levels = torch.tensor([-4.0, 4, 90, 110])
    for x, change in ((-3.0, 0), (3.0, 4)):
        gates = torch.ones(1, 2, requires_grad=True)
        apply(torch.tensor([x]), levels, 1, 1.0, 0, gates=gates).sum().backward()
        assert gates.grad[0, 1] == change


def test_every_group_gets_its_own_gradients():
    """Three channels at 1, 2 and 3 bits give what three tensors of their own give."""
    bits, axis = (1, 2, 3), 1
    rng = seeded(3)
    levels = torch.rand(3, 8, generator=rng) * 255
    scale, zero = representable_scale(torch.rand(3, generator=rng)), torch.tensor([0.0, 128, 255])
    x, grad = (torch.randn(5, 3, 7, generator=rng) * 40 for _ in range(2))

    def gradients(x: Tensor, grad: Tensor, *rest: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, *rest)]
        gates = torch.ones(len(bits), 3, requires_grad=True)
        x, levels, scale, zero = inputs
        out = fake_quantize(x, levels, scale, zero.detach(), gates, bits, axis=axis, correction=0.1)
        return [out, *torch.autograd.grad(out, (x, levels, scale, gates), grad)]

    together = gradients(x, grad, levels, scale, zero, bits=bits)
    for g in range(3):
        one = slice(g, g + 1)
        alone = gradients(
            x[:, one], grad[:, one], levels[one], scale[one], zero[one], bits=bits[one]
        )
        for number, (a, t) in enumerate(zip(alone, together, strict=True)):
            torch.testing.assert_close(t[:, one] if number < 2 else t[one], a)


def test_gradients_in_autocast_are_those_outside():
    def gradients(enabled: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, levels, scale, gates)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = fake_quantize(
                inputs[0], inputs[1], inputs[2], zero, inputs[3], (2,), correction=0.3
            )
            return [out, *torch.autograd.grad(out, inputs, grad)]

    x, grad = (torch.randn(1000, generator=seeded(n)) for n in range(2))
    levels, gates = torch.rand(1, 8, generator=seeded(2)) * 255, torch.ones(1, 3)
    scale, zero = representable_scale(torch.tensor([0.02])), torch.tensor([128.0])
    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_those_of_the_same_values_in_float32(dtype):
    x, grad = (torch.randn(500, generator=seeded(n)).to(dtype) for n in range(2))
    levels = torch.rand(16, generator=seeded(2)) * 255
    results = []
    for kind in (dtype, torch.float32):
        inputs = x.to(kind).requires_grad_(), levels.clone().requires_grad_()
        out = apply(inputs[0], inputs[1], 3, 0.015625, 128, correction=0.2)
        results.append(torch.autograd.grad(out, inputs, grad.to(kind)))
    assert results[0][0].dtype == dtype
    assert torch.equal(results[0][0].float(), results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
