"""Gradients of fake_quantize against literal formulas and finite differences in float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import LEVELS, few, quantize, quantize_one, seeded, seeds
from torch import Tensor

from ddqcli.quant.grid import representable_scale


def selections(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, n] float64: x_q as shares of the values, and x as shares of its two neighbors."""
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
    """Eqn (3), and the gradients of levels and scale: x_q minus the straight line, plus Eqn (9).

    The selected levels are held fixed, and R's gradient passes straight through.
    """
    inputs = levels.double().requires_grad_(), scale.double().requires_grad_()
    exact, rounded = oracle.averaged(inputs[0], bits), oracle.effective(levels, bits)
    values = (rounded + exact - exact.detach() - zero) * inputs[1]
    x_o, line = selections(x, values.detach())
    x_q = x_o @ values
    task = grad.double() @ (x_q - line @ values) + correction * (x_q.detach() - x.double()) @ x_q
    return x_q, list(torch.autograd.grad(task, inputs))


def separate(seed: int, b: int, s: int) -> tuple[Tensor, Tensor]:
    """Shuffled levels with distinct means, and values of which none lies on a level."""
    rng = seeded(seed)
    centers = (torch.randperm(120, generator=rng)[: 2**s].sort().values * 2 + 1.0)[:, None]
    offsets = torch.linspace(-0.9, 0.9, 2 ** (b - s) + 2)[1:-1] if b > s else torch.zeros(1)
    levels = (centers + (offsets - offsets.mean())).view(-1)
    return levels[torch.randperm(2**b, generator=rng)], torch.randint(
        -30, 290, (400,), generator=rng
    ) + 0.3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("correction", [0.0, 0.37])
def test_level_and_scale_gradients_are_those_of_the_literal_formula(correction, gated):
    for b, s in oracle.all_bits():
        if s < 7:
            assert_literal_gradients(b, s, correction, gated)


def assert_literal_gradients(b, s, correction, gated):
    levels, x = separate(b * 8 + s, b, s)
    zero, scale = 90.0, torch.tensor([0.03125])
    x, grad = (x - zero) * scale, torch.randn(400, generator=seeded(s))
    inputs = levels.clone().requires_grad_(), scale.clone().requires_grad_()
    gates = torch.ones(1, b, requires_grad=gated)
    out = quantize(
        x, inputs[0][None], inputs[1], torch.tensor([zero]), gates, (s,), correction=correction
    )
    grads = torch.autograd.grad(out, inputs, grad)
    x_q, expected = literal(x, levels, s, scale, zero, grad, correction)
    assert torch.equal(x_q.float(), out)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("b", "s"), [(b, s) for b, s in oracle.all_bits() if b <= 5])
def test_level_gradients_are_finite_differences_of_the_oracle(b, s):
    """Moving a stored level by Z_U grid steps moves its run's mean by exactly one step."""
    run, scale, zero = 2 ** (b - s), 0.25, 100.0
    spacing = 250 // 2**s
    centers = torch.arange(2**s) * spacing + spacing // 2
    levels = centers.repeat_interleave(run).float()[torch.randperm(2**b, generator=seeded(b))]
    # Far from every threshold.
    x = (torch.cat([centers - 0.4, centers + 0.4]).repeat(3) - zero) * scale
    grad = torch.randn(len(x), generator=seeded(s)).double()
    parameter = levels.clone().requires_grad_()
    out = quantize_one(x, parameter, s, scale, zero)
    (found,) = torch.autograd.grad(out, parameter, grad.float())
    before = ((oracle.effective(levels, s) - zero) * scale).numpy()
    outside = torch.from_numpy((x.numpy() < before[0]) | (x.numpy() > before[-1]))

    def task(levels: Tensor) -> float:
        line = np.interp(x.numpy(), before, ((oracle.effective(levels, s) - zero) * scale).numpy())
        line = torch.from_numpy(line).where(~outside, 0)
        return float(grad @ (oracle.quantize(x, levels, s, scale, zero) - line))

    for k in range(2**b):
        step = torch.zeros(2**b)
        step[k] = run
        difference = (task(levels + step) - task(levels - step)) / (2 * run)
        assert float(found[k]) == pytest.approx(difference, rel=1e-4, abs=1e-4)


def test_dense_values_do_not_move_inner_levels():
    """Shifting inner levels leaves the sum of x_q unchanged, but Eqn (8) alone counts members."""
    levels, x = torch.tensor([10.0, 60, 130, 180]), torch.linspace(10, 180, 5441)

    def total(levels: Tensor) -> float:
        return float(oracle.quantize(x, levels, 2, 1.0, 0.0).sum())

    parameter = levels.clone().requires_grad_()
    quantize_one(x, parameter, 2, 1.0, 0.0).sum().backward()
    inner = torch.tensor([0.0, 1, 1, 0])
    truth = (total(levels + inner) - total(levels - inner)) / 2
    assert float(parameter.grad @ inner) == pytest.approx(truth, abs=20)
    assert int(((x >= 35) & (x < 155)).sum()) > 100 * abs(truth)  # the members


@few
@given(seeds, st.sampled_from([2, 3, 5, 8]))
def test_the_step_size_of_evenly_spaced_levels_has_the_gradient_of_lsq(seed, bits):
    """Esser et al. 2020, Eqn (3): round(x / s) - x / s within the range, the outer code beyond."""
    x, grad = torch.randn(300, generator=seeded(seed)), torch.randn(300, generator=seeded(seed + 1))
    half = 2 ** (bits - 1)
    scale = 2.0 / half  # which leaves some values beyond the range
    step, codes = torch.tensor([scale], requires_grad=True), torch.arange(-half, half)[None] + 128.0
    out = quantize(x, codes, step, torch.tensor([128.0]), torch.ones(1, bits), (bits,))
    (found,) = torch.autograd.grad(out, step, grad)
    v = x.double() / scale
    inside = (v >= -half) & (v <= half - 1)
    expected = float(grad.double() @ (v.clamp(-half, half - 1).round() - v * inside))
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_single_level_and_the_mean_of_a_run_move_equally_fast():
    """Eqn (8): each of Z_U levels gets 1 / Z_U of the sum over the members of their mean."""
    x, grads = torch.zeros(10), []
    for b in (1, 5):
        levels = torch.tensor([-20.0, 20]).repeat_interleave(2 ** (b - 1)).requires_grad_()
        quantize_one(x, levels, 1, 1.0, 0.0).sum().backward()
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
    out = quantize_one(x, levels, s, 0.5, 77, correction=correction)
    (found,) = torch.autograd.grad(out, x, grad)
    inside = (x.detach().double() >= values[0]) & (x.detach().double() <= values[-1])
    assert torch.equal(found, torch.where(inside, grad, 0.0))  # Eqn (9) does not reach x


def gate_case(seed: int, b: int, s: int) -> Tensor:
    """Shuffled levels [2^b] that are whole numbers at s + 1 and at s bits: nothing is rounded."""
    rng = seeded(seed)
    whole = torch.randperm(64, generator=rng)[: 2 ** min(b, s + 1)].sort().values * 4.0
    halves = whole.view(-1, 2)
    if s < b:
        halves[:, 1] = halves[:, 0] + 2 * torch.randint(0, 2, (len(halves),), generator=rng)
    levels = halves.reshape(-1).repeat_interleave(max(1, 2 ** (b - s - 1)))
    return levels[torch.randperm(2**b, generator=rng)]


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_gate_gradients_are_the_change_of_eqn_3_when_a_gate_closes_or_opens(correction):
    """To the pair's mean for closing, to the nearer child for opening."""
    for b, s in oracle.all_bits():
        if s <= 5:
            assert_gate_gradients(b, s, correction)


def assert_gate_gradients(b, s, correction):
    levels, scale, zero = gate_case(b * 8 + s, b, s), 0.125, 31.0
    x = (torch.randint(-40, 600, (500,), generator=seeded(b)) / 2 - zero) * scale
    grad = torch.randn(500, generator=seeded(s))
    gates = torch.ones(1, b, requires_grad=True)
    out = quantize_one(x, levels, s, scale, zero, gates=gates, correction=correction)
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
    """Opening a gate splits level 0 into 0 and 4: values below stay, values between go to 4."""
    levels = torch.tensor([-4.0, 4, 90, 110])
    for x, change in ((-3.0, 0), (3.0, 4)):
        gates = torch.ones(1, 2, requires_grad=True)
        quantize_one(torch.tensor([x]), levels, 1, 1.0, 0, gates=gates).sum().backward()
        assert gates.grad[0, 1] == change


def test_gates_of_huge_values_get_finite_gradients():
    x, gates = torch.tensor([3e38, 3e38, 1.0]), torch.ones(1, 2, requires_grad=True)
    quantize_one(x, torch.tensor([0.0, 10, 20, 30]), 2, 1.0, 0.0, gates=gates).sum().backward()
    assert torch.equal(gates.grad, torch.tensor([[0.0, 5.0]]))


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
        out = quantize(x, levels, scale, zero.detach(), gates, bits, axis=axis, correction=0.1)
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
            out = quantize(inputs[0], inputs[1], inputs[2], zero, inputs[3], (2,), correction=0.3)
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
        out = quantize_one(inputs[0], inputs[1], 3, 0.015625, 128, correction=0.2)
        results.append(torch.autograd.grad(out, inputs, grad.to(kind)))
    assert results[0][0].dtype == dtype
    assert torch.equal(results[0][0].float(), results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
