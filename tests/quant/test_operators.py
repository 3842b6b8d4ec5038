"""The operators' kernels against the float64 oracle and PyTorch's kernels.

Triton's on CUDA, or interpreted; those in C on a CPU. Values and gradients of x agree bit for bit.
Sums are taken in another order than PyTorch's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
from quant_cases import LEVELS, normal, seeded
from quant_cases import quantize as quantize_by
from test_activation import brute_force, decisions
from test_activation import uniform as uniform_quantizer
from test_fake_quantize_gradients import literal, separate
from torch.fx.experimental.proxy_tensor import make_fx

from ddqcli.quant import cpu_launch, operators
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.fake_quantize import fake_quantize_many
from ddqcli.quant.grid import representable_scale
from ddqcli.quant.lookup import make_lookup_tables

# On a CPU the kernels in C, or Triton's in the process of `test_by_the_interpreter`.
no_compiler = not operators.INTERPRETED and cpu_launch.library() is None
on_cpu = pytest.param("cpu", marks=pytest.mark.skipif(no_compiler, reason="finds no C compiler"))
on_cuda = pytest.param("cuda", marks=pytest.mark.cuda)
on_each_device = pytest.mark.parametrize("device", [on_cpu, on_cuda])
of_triton = pytest.mark.parametrize("device", [*(["cpu"] * operators.INTERPRETED), on_cuda])
quantize = partial(quantize_by, use_compiled=True)
ALL_TYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@pytest.mark.skipif(operators.INTERPRETED, reason="this is its run")
@pytest.mark.skipif(not operators.installed(), reason="Triton is not installed here")
def test_by_the_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        [*command, "-m", "not cuda", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", answer.stdout)[1]) >= 40


@pytest.fixture(autouse=True)
def rounding_as_a_card_does(monkeypatch):
    """Triton's interpreter truncates float32 to bfloat16, where a GPU rounds half to even."""
    if not operators.INTERPRETED:
        return
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def convert(x, source, target, *rounding):
        if target.name != "bf16" or source.name != "fp32":
            return truncating(x, source, target, *rounding)
        return torch.tensor(x).bfloat16().view(torch.uint16).numpy().reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def no_failure():
    yield
    assert not operators._failed


@contextmanager
def by_torch():
    operators._failed = True
    yield
    operators._failed = False


def uniform(*args) -> ActivationQuantizer:
    quantizer = uniform_quantizer(*args)
    quantizer.use_compiled = True
    return quantizer


def normal_numbers(x, device):
    """x on the device; on CUDA without subnormal numbers, which Triton's division takes for 0."""
    tiny = torch.finfo(torch.float32).tiny
    return (x if device == "cpu" else torch.where(x.abs() < tiny, 0.0, x)).to(device)


def on(device, *tensors):
    return [t.to(device) for t in tensors]


# ---- learned levels


@on_each_device
@pytest.mark.parametrize("kind", ["anywhere", "half steps", "coinciding"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_decision_on_the_grid_is_that_of_eqn_3(bits, kind, device):
    levels = LEVELS[kind](seeded(bits), 2**bits)
    scale, zero = float(representable_scale(torch.tensor(0.013 * bits))), 20 * bits
    x = normal_numbers(oracle.edge_cases(scale, zero), device)
    grid = on(device, torch.tensor([scale]), torch.tensor([float(zero)]), torch.ones(1, bits))
    out = quantize(x, levels[None].to(device), *grid, (bits,))
    expected = oracle.quantize(x.cpu(), levels, bits, scale, zero)
    assert oracle.same_bits(out.cpu(), expected.float())


@on_each_device
@ALL_TYPES
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_half_precision_and_what_is_not_finite(bits, dtype, device):
    levels = LEVELS["anywhere"](seeded(bits), 2**bits)
    x = oracle.edge_cases(0.015625, 100)[:-4].to(dtype)
    x = torch.cat(
        [
            normal_numbers(x.float(), device).to(dtype),
            x.new_tensor([torch.inf, torch.nan]).to(device),
        ]
    )
    grid = on(device, torch.tensor([0.015625]), torch.tensor([100.0]), torch.ones(1, bits))
    out = quantize(x, levels[None].to(device), *grid, (bits,)).cpu()
    assert out.isnan().nonzero().flatten().tolist() == [len(x) - 2, len(x) - 1]
    expected = oracle.quantize(x[:-2].double().cpu(), levels, bits, 0.015625, 100).float()
    assert oracle.same_bits(out[:-2], expected.to(dtype))


@on_each_device
@pytest.mark.parametrize("correction", [0.0, 0.37])
@pytest.mark.parametrize("bits", range(1, 8))
def test_level_and_scale_gradients_are_those_of_the_literal_formula(bits, correction, device):
    levels, x = separate(bits, bits, bits) if bits < 7 else (torch.arange(128.0) * 2 + 1, None)
    x = torch.randint(-30, 290, (400,), generator=seeded(1)) + 0.3 if x is None else x
    scale, zero = torch.tensor(0.03125), 90.0
    x, grad = (x - zero) * scale, normal(400, seed=bits)
    inputs = [t.to(device).requires_grad_() for t in (levels, scale)]
    gates, zeros = on(device, torch.ones(1, bits), torch.tensor([zero]))
    out = quantize(
        x.to(device), inputs[0][None], inputs[1][None], zeros, gates, (bits,), correction=correction
    )
    found = torch.autograd.grad(out, inputs, grad.to(device))
    x_q, expected = literal(x, levels, bits, scale, zero, grad, correction)
    assert torch.equal(x_q.float(), out.cpu())
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=1e-4, atol=1e-4)


def gradients(device, x, grad, levels, bits, *, gated, correction, axis=0):
    groups = len(bits)
    inputs = [
        t.to(device, copy=True).requires_grad_()
        for t in (x, levels, representable_scale(torch.full((groups,), 0.03)))
    ]
    gates = torch.ones(groups, 8, device=device, requires_grad=gated)
    zero = torch.full((groups,), 100.0, device=device)
    out = quantize(
        inputs[0], inputs[1], inputs[2], zero, gates, bits, axis=axis, correction=correction
    )
    wanted = [*inputs, *([gates] if gated else [])]
    return [out, *torch.autograd.grad(out, wanted, grad.to(device))]


@on_each_device
@pytest.mark.parametrize(
    ("bits", "gated", "dtype"),
    [
        *(((bits,), gated, torch.float32) for bits in (1, 4, 8) for gated in (False, True)),
        ((4,), False, torch.float16),
        ((4,), False, torch.bfloat16),
        ((2, 3, 5), True, torch.bfloat16),
        ((2, 3, 5), False, torch.float32),
    ],
    ids=str,
)
def test_gradients_are_those_of_pytorch(bits, gated, dtype, device):
    """For one tensor and for channels, in any dense memory format."""
    levels = torch.rand(len(bits), 256, generator=seeded(3)) * 255
    x, grad = (normal(2, 3, 9, 10, seed=n).to(dtype) * (3 - 2 * n) for n in range(2))
    x = x.to(memory_format=torch.channels_last)
    options = {"gated": gated, "correction": 0.2, "axis": 1}
    found = gradients(device, x, grad, levels, bits, **options)
    with by_torch():
        expected = gradients(device, x, grad, levels, bits, **options)
    assert found[1].dtype == dtype
    assert all(oracle.same_bits(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@on_each_device
def test_several_tensors_together_are_those_of_pytorch(device):
    bits, corrections = (2, 4, 3), [0.0, 0.7, 0.1]
    levels, scale = torch.rand(3, 16, generator=seeded(4)) * 255, torch.full((3,), 0.0625)
    shapes = ((40, 3), (7,), (5, 2, 300))
    xs, grads = ([normal(*shape, seed=n) for shape in shapes] for n in range(2))
    results = []
    for torch_alone in (False, True):
        inputs = [t.to(device, copy=True).requires_grad_() for t in (levels, scale, *xs)]
        zero, gates = on(device, torch.full((3,), 100.0), torch.ones(3, 4))
        tables = make_lookup_tables(inputs[0], inputs[1], zero, gates, bits)
        operators._failed = torch_alone
        out = fake_quantize_many(inputs[2:], tables, corrections, use_compiled=True)
        found = torch.autograd.grad(out, inputs, [grad.to(device) for grad in grads])
        operators._failed = False
        results.append((*out, *found[2:], *found[:2]))
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        if number < 6:
            assert oracle.same_bits(a, b)
        torch.testing.assert_close(a, b)


@on_each_device
def test_the_same_values_give_the_same_sums_bit_for_bit(device):
    """From many programs, which end in any order; on a CPU with any number of threads."""
    values = 3000 if operators.INTERPRETED else 5_000_000
    x, grad = normal(values) * 3, normal(values, seed=1)
    levels = torch.rand(1, 256, generator=seeded(3)) * 255
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(device, x, grad, levels, (4,), gated=False, correction=0.2))
    torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert all(oracle.same_bits(a, b) for a, b in zip(first, other, strict=True))


@on_each_device
def test_levels_that_are_not_learned_pass_the_gradient_between_the_outer_ones(device):
    levels = torch.tensor([10.0, 20, 30, 40])
    x = oracle.edge_cases(0.5, 77)[:-10].to(device).requires_grad_()
    grid = on(device, torch.tensor([0.5]), torch.tensor([77.0]), torch.ones(1, 2))
    out = quantize(x, levels[None].to(device), *grid, (2,))
    grad = normal(len(x)).to(device)
    (found,) = torch.autograd.grad(out, x, grad)
    inside = (x >= (10 - 77) * 0.5) & (x <= (40 - 77) * 0.5)
    assert torch.equal(found, torch.where(inside, grad, 0.0))


@pytest.mark.skipif(no_compiler, reason="finds no C compiler")
@pytest.mark.skipif(operators.INTERPRETED, reason="of the kernels in C")
@pytest.mark.parametrize("name", operators._SCHEMAS)
def test_tables_in_float64_are_read_as_float32(name):
    args, operator = operands("cpu")[name], getattr(torch.ops.ddq, name)
    number = 1 + ("gradients" in name or name == "straight_through")  # of x, and grad
    expected = operator(*args)
    tables = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
    torch.set_default_dtype(torch.float64)
    try:
        found = operator(*args[:number], *tables[number:])
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.skipif(no_compiler, reason="finds no C compiler")
@pytest.mark.skipif(operators.INTERPRETED, reason="of the kernels in C")
def test_the_kernels_in_c_refuse_values_that_they_would_misread():
    x, *others = operands("cpu")["quantize"]
    with pytest.raises(TypeError, match=r"do not take torch\.float64 on cpu"):
        cpu_launch.quantize(x.double(), *others)


# ---- a uniform step


@on_each_device
@ALL_TYPES
@pytest.mark.parametrize(("bits", "low"), [(1, 0), (4, 8), (8, 0), (8, 100)])
def test_a_uniform_step_rounds_half_to_even_and_has_the_gradient_of_pytorch(
    bits, low, dtype, device
):
    quantizer = uniform(bits, -3.3, low).to(device)
    scale, high = float(quantizer.scale().detach()), 2**bits - 1 - low
    x = torch.cat([decisions(scale, -low, high)[:-4], normal(500) * 2**bits * scale])
    x = normal_numbers(x, device).to(dtype).requires_grad_()
    grad = normal(len(x), seed=1).to(dtype).to(device)

    def results():
        out = quantizer(x)
        return out, *torch.autograd.grad(out, (x, quantizer.log2_scale), grad)

    out, *found = results()
    with by_torch():
        _, *expected = results()
    rounded = brute_force(x.detach().cpu(), scale, -low, high)
    assert oracle.same_bits(out.cpu(), rounded.float().to(dtype))
    assert oracle.same_bits(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-3)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype, device=device)
    assert bool(quantizer(bad).isnan().all())


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_the_gradient_of_a_uniform_step_and_infinity_counts_as_an_outer_code(
    dtype, device
):
    quantizer = uniform(4, -3.0, 8).to(device)
    x = normal(600).to(dtype).to(device)
    for value, expected in ((torch.nan, torch.nan), (torch.inf, 7.0), (-torch.inf, -8.0)):
        x[-1] = value
        out = quantizer(x)
        grad = torch.zeros_like(x)
        grad[-1] = 2
        (found,) = torch.autograd.grad(out, quantizer.log2_scale, grad)
        # The step is 1 / 8; its logarithm's gradient is code * step * ln 2.
        wanted = torch.tensor(2 * expected / 8).double() * torch.tensor(2.0).double().log()
        torch.testing.assert_close(found.cpu(), wanted.float(), equal_nan=True)


# ---- operators


def operands(device):
    x, grad = normal(1, 300).to(device), normal(1, 300, seed=1).to(device)
    levels = torch.rand(1, 4, generator=seeded(0)) * 255
    grid = on(device, torch.tensor([0.03125]), torch.tensor([100.0]), torch.ones(1, 2))
    tables = make_lookup_tables(levels.to(device), *grid, (2,))
    c, starts = tables.cells, torch.tensor([0, 300], device=device)
    cells, of_bins = (c.half_step, c.zero_cell), (c.nearest_value, c.bin)
    lambda_, scale = torch.ones(1, device=device), torch.tensor(0.1, device=device)
    places = starts, 300
    return {
        "quantize": (x, *places, c.nearest_value, *cells),
        "straight_through": (grad, x, *places, tables.values),
        "level_gradients": (grad, x, *places, tables.values, *of_bins, *cells, lambda_, True),
        "uniform_quantize": (x, scale, -3, 12),
        "uniform_gradients": (grad, x, scale, -3, 12),
    }


@on_each_device
def test_operators_can_be_traced(device):
    for name, args in operands(device).items():
        operator = getattr(torch.ops.ddq, name)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator.default, args, test_utils=tests)
        graph = make_fx(lambda *args, o=operator: o(*args), tracing_mode="fake")(*args)
        for a, b in zip(graph(*args), operator(*args), strict=True):
            assert torch.equal(a, b)


@of_triton
def test_a_kernel_that_cannot_run_is_told_once_and_pytorch_serves(device, monkeypatch):
    from ddqcli.quant import triton_launch

    def fail(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("no such card")

    tried: list[int] = []
    levels, x = torch.tensor([0.0, 10, 20, 30], device=device), normal(50).to(device)

    def run():
        one = torch.ones(1, device=device)
        return quantize(x, levels[None], one, one, torch.ones(1, 2, device=device), (2,))

    expected = run()
    monkeypatch.setattr(triton_launch, "quantize", fail)
    monkeypatch.setattr(operators, "_failed", False)
    with pytest.warns(UserWarning, match="slower: RuntimeError: no such card") as warned:
        results = [run() for _ in range(3)]
    assert len(tried) == len(warned) == 1
    assert all(torch.equal(out, expected) for out in results)
