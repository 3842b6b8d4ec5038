"""Compiled kernels against the eager ones, which the oracle checks."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from quant_cases import normal, quantize, seeded
from test_activation import decisions, uniform

from ddqcli.quant import fake_quantize, kernels, torch_kernels
from ddqcli.quant.compiled import can_compile
from ddqcli.quant.grid import representable_scale
from ddqcli.quant.lookup import make_lookup_tables


@pytest.fixture(scope="module")
def compiler() -> None:
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile finds no compiler here")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("bits", "correction", "gated"),
    [
        ((4,), 0.1, False),  # thresholds
        ((4,), 0.1, True),  # tables, because the gates are learned
        ((6, 5, 6), 0.0, False),  # tables, because there are several groups and many levels
    ],
    ids=str,
)
def test_compiled_kernels_agree_with_the_eager_ones(bits, correction, gated, monkeypatch):
    """Values and gradients of x bit for bit. Sums may be taken in another order."""
    monkeypatch.setattr(fake_quantize, "COMPILE_FROM", 1)
    groups = len(bits)
    levels = (torch.rand(groups, 64, generator=seeded(0)) * 255).requires_grad_()
    scale = representable_scale(torch.full((groups,), 0.03)).requires_grad_()
    zero = torch.full((groups,), 100.0)
    gates = torch.ones(groups, 6, requires_grad=gated)
    learned = (levels, scale, gates) if gated else (levels, scale)
    edges = oracle.edge_cases(float(scale[0].detach()), 100)
    x = torch.cat([edges, torch.randn(3000, generator=seeded(1)) * 3])
    x = x[x.abs() < 1e4]  # further out, corrections would drown the sums
    x = x[: len(x) // 3 * 3].view(3, -1).requires_grad_()
    grad = torch.randn(x.shape, generator=seeded(2))
    results = []
    for use_compiled in (False, True):
        out = quantize(
            x, levels, scale, zero, gates, bits, correction=correction, use_compiled=use_compiled
        )
        results.append((out, *torch.autograd.grad(out, (x, *learned), grad)))
    (out, grad_x, *of_learned), (fused_out, fused_grad_x, *fused_of_learned) = results
    assert oracle.same_bits(fused_out, out)
    assert torch.equal(fused_grad_x, grad_x)
    for fused, expected in zip(fused_of_learned, of_learned, strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
    bad = x.detach().clone()
    bad[1, 7], bad[2, 9] = torch.nan, torch.inf
    out = quantize(bad, levels, scale, zero, gates, bits, use_compiled=True)
    assert out.isnan().nonzero().tolist() == [[1, 7], [2, 9]]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, 0), (torch.bfloat16, 100)], ids=str)
def test_a_compiled_uniform_step_is_the_eager_one_bit_for_bit(dtype, low):
    eager, compiled = (uniform(8, -3.3, low) for _ in range(2))
    compiled.use_compiled = True
    x = torch.cat([decisions(float(eager.scale().detach()), -low, 255 - low), normal(500) * 20]).to(
        dtype
    )
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    assert bool(compiled(bad).isnan().all())
    grad = normal(len(x), seed=1).to(dtype)
    results = []
    for quantizer in (eager, compiled):
        inputs = x.clone().requires_grad_()
        out = quantizer(inputs)
        results.append((out, *torch.autograd.grad(out, (inputs, quantizer.log2_scale), grad)))
    assert oracle.same_bits(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    torch.testing.assert_close(results[1][2], results[0][2])  # a sum: its order may differ


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("use_compiled", [False, True])
def test_thresholds_are_for_few_levels_of_one_group_in_compiled_kernels(groups, bits, use_compiled):
    values = torch.zeros(groups, 2**bits)
    expected = use_compiled and groups == 1 and 2**bits <= 16
    assert kernels.suits_thresholds(values, use_compiled) == expected


@pytest.mark.parametrize(
    ("trained", "path"),
    [
        ((), "_StraightThrough"),
        (("levels",), "_LevelGradients"),
        (("levels", "gates"), "_LevelGradients"),
    ],
)
def test_the_backward_pass_follows_from_what_is_trained(trained, path):
    inputs = {"levels": torch.rand(1, 4) * 255, "gates": torch.ones(1, 2)}
    for name in trained:
        inputs[name].requires_grad_()
    tables = make_lookup_tables(
        inputs["levels"], torch.ones(1), torch.zeros(1), inputs["gates"], (2,)
    )
    out = fake_quantize.fake_quantize(normal(50).requires_grad_(), tables)
    assert type(out.grad_fn).__name__ == f"{path}Backward"


@pytest.mark.parametrize("correction", [None, 0.2])
def test_threshold_and_lookup_kernels_give_the_same_gradients(correction, monkeypatch):
    used, levels = [], torch.rand(1, 16, generator=seeded(0)) * 255
    monkeypatch.setattr(kernels, "maybe_compiled", lambda kernel, *_: used.append(kernel) or kernel)
    tables = make_lookup_tables(
        levels, torch.tensor([0.03125]), torch.tensor([100.0]), torch.ones(1, 4), (4,)
    )
    factor = None if correction is None else torch.tensor([correction])
    x, grad = normal(2000) * 3, normal(2000, seed=1)
    by_threshold, by_lookup = (
        kernels.gradients(
            tables.values, kernels.Constants(tables.cells, factor, 0, fused), [grad], [x], False
        )
        for fused in (True, False)
    )
    assert used == [torch_kernels.threshold_gradients, torch_kernels.lookup_gradients]
    assert torch.equal(by_threshold.xs[0], by_lookup.xs[0])
    torch.testing.assert_close(by_threshold.values, by_lookup.values)
