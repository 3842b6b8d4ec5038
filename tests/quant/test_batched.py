"""Precomputed tables and outputs against the same quantizers on their own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from quant_cases import normal
from test_activation import fitted
from torch import Tensor

from ddqcli.quant import batched as module
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.batched import batched
from ddqcli.quant.quantizer import DDQuantizer

Weights = list[tuple[DDQuantizer, Tensor]]


def model() -> tuple[Weights, list[ActivationQuantizer], Tensor]:
    """Weights of several sizes and kinds and an input, with their quantizers."""
    xs = [normal(40, 30), normal(7, 3, seed=1), normal(50, seed=2), normal(4, 9, seed=3)]
    quantizers = [
        DDQuantizer.from_tensor(xs[0], 8, 4),
        DDQuantizer.from_tensor(xs[1], 8, 3),
        DDQuantizer.from_tensor(xs[2], 8, kind="uniform"),
        DDQuantizer.from_tensor(xs[3], 8, 2, channel_axis=0),
    ]
    for number, quantizer in enumerate(quantizers):
        quantizer.correction = 0.1 * number
    weights = list(zip(quantizers, [x.requires_grad_() for x in xs], strict=True))
    activation = normal(60, seed=4)
    return weights, [fitted(activation, bits) for bits in (4, 8, 5)], activation


def results(weights: Weights, others: list[ActivationQuantizer], x: Tensor) -> list[Tensor]:
    outputs = [quantizer(weight) for quantizer, weight in weights] + [q(x) for q in others]
    learned = [p for q in [*(q for q, _ in weights), *others] for p in q.parameters()]
    inputs = [w for _, w in weights] + [p for p in learned if p.requires_grad]
    loss = sum(output.square().sum() for output in outputs)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*outputs, *grads]


@pytest.mark.parametrize("small", [100, 2**16], ids=["large and small", "all small"])
def test_batched_quantizers_give_what_each_gives_alone(small, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", small)
    weights, others, x = model()
    alone = results(weights, others, x)
    with batched(weights, others):
        together = results(weights, others, x)
        assert weights[1][0].precomputed_output is not None
        assert others[0].learned.precomputed_tables is not None
        assert others[1].precomputed_scale is not None
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(together[:7], alone[:7], strict=True))


def test_the_step_size_of_an_input_that_is_not_used_gets_no_gradient():
    """Adam's momentum would go on moving it. Unused levels get zeros: they share their tables."""
    weights, _, x = model()
    used, unused, of_levels, unused_levels = (fitted(x, bits) for bits in (8, 5, 4, 4))
    grads = []
    for together in (False, True):
        used.log2_scale.grad = None
        inputs = [unused, used, unused_levels, of_levels]
        with batched(weights, inputs) if together else nullcontext():
            (used(x).square().sum() + of_levels(x).square().sum()).backward()
        grads.append(used.log2_scale.grad)
    assert torch.equal(*grads)
    assert grads[0] != 0
    assert unused.log2_scale.grad is None
    assert of_levels.learned.levels.grad.any()
    assert not unused_levels.learned.levels.grad.any()


def test_another_tensor_than_the_batched_one_is_quantized_as_usual():
    weights, others, _ = model()
    quantizer, _ = weights[1]
    x = normal(5, 5)
    expected = quantizer(x)
    with batched(weights, others):
        assert torch.equal(quantizer(x), expected)


def test_nothing_precomputed_outlives_the_step_even_after_an_error():
    weights, others, _ = model()
    with pytest.raises(ZeroDivisionError), batched(weights, others):
        _ = 1 / 0
    for quantizer in [*(q for q, _ in weights), others[0].learned]:
        assert quantizer.precomputed_output is quantizer.precomputed_tables is None
    assert others[1].precomputed_scale is None
