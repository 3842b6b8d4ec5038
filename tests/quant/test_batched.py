"""Precomputed tables and outputs against the same quantizers on their own."""

from __future__ import annotations

import pytest
import torch
from quant_cases import normal
from torch import Tensor

from ddqcli.quant import batched as module
from ddqcli.quant.batched import batched
from ddqcli.quant.quantizer import DDQuantizer


def model() -> tuple[list[tuple[DDQuantizer, Tensor]], DDQuantizer, Tensor]:
    """Weights of several sizes and kinds with their quantizers, and an activation's quantizer."""
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
    return weights, DDQuantizer.from_tensor(activation, 4), activation


def results(
    weights: list[tuple[DDQuantizer, Tensor]], other: DDQuantizer, x: Tensor
) -> list[Tensor]:
    outputs = [quantizer(weight) for quantizer, weight in weights] + [other(x)]
    learned = [p for q in [*(q for q, _ in weights), other] for p in q.parameters()]
    inputs = [w for _, w in weights] + [p for p in learned if p.requires_grad]
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("small", [100, 2**16], ids=["large and small", "all small"])
def test_batched_quantizers_give_what_each_gives_alone(small, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", small)
    weights, other, x = model()
    alone = results(weights, other, x)
    with batched(weights, [other]):
        together = results(weights, other, x)
        assert weights[1][0].precomputed_output is not None
        assert other.precomputed_tables is not None
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(together[:5], alone[:5], strict=True))


def test_another_tensor_than_the_batched_one_is_quantized_as_usual():
    weights, other, _ = model()
    quantizer, _ = weights[1]
    x = normal(5, 5)
    expected = quantizer(x)
    with batched(weights, [other]):
        assert torch.equal(quantizer(x), expected)


def test_nothing_precomputed_outlives_the_step_even_after_an_error():
    weights, other, _ = model()
    with pytest.raises(ZeroDivisionError), batched(weights, [other]):
        _ = 1 / 0
    for quantizer in [*(q for q, _ in weights), other]:
        assert quantizer.precomputed_output is quantizer.precomputed_tables is None
