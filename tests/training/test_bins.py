"""Bin regularization in training: its gradient on the weights alone, once bits are frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import STEPS, begin, finish, recipe
from torch import Tensor

from ddqcli.qat.model import QuantizedModel
from ddqcli.quant.bin_regularization import bin_regularization
from ddqcli.training import trainer as trainers
from ddqcli.training.bins import regularize_bins


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_weights_get_the_gradient_of_their_sum_and_nothing_else_does(granularity: str) -> None:
    overrides = [{"match": "3", "bits": 8}]
    weights = {"granularity": granularity, "max_bits": 3}
    running = begin(recipe(weights=weights, overrides=overrides, budget={}))
    model: QuantizedModel = running.quantized
    if granularity == "channel":
        first = model.tensors[0]
        first.quantizer.fit(first.parameter, (2, 3, *[1] * 6))
    regularize_bins(model, 0.25)
    regularize_bins(model, 0.75)
    for tensor in model.tensors:
        if tensor.kind == "bias" or tensor.name == "3.weight":
            assert tensor.parameter.grad is None
            continue
        x = tensor.parameter.detach().clone().requires_grad_()
        groups = len(tensor.quantizer.bits)
        rows = [x.reshape(1, -1)] if groups == 1 else [row.reshape(1, -1) for row in x]
        with torch.no_grad():
            quantized = tensor.quantizer(x)
        levels = quantized.reshape(groups, -1)
        terms = []
        for g, row in enumerate(rows):
            positions, scale, zero = tensor.quantizer.effective_levels()
            values: Tensor = (positions[g] - zero[g]) * scale[g]
            assert set(levels[g].tolist()) <= set(values.tolist())
            terms.append(bin_regularization(row, values[None]))
        torch.stack(terms).mean().backward()
        assert tensor.parameter.grad is not None
        assert torch.allclose(tensor.parameter.grad, x.grad, rtol=1e-4, atol=1e-8)  # type: ignore[arg-type]
    assert all(t.quantizer.levels.grad is None for t in model.tensors)


@pytest.mark.parametrize(
    ("sections", "weight"),
    [
        ({"method": "sdq"}, 0.1),
        ({"method": "sdq", "train": {"bin_regularization": 0}}, None),
        ({}, None),
        ({"train": {"bin_regularization": 0.5}}, 0.5),
    ],
)
def test_it_begins_when_the_bit_widths_freeze(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], weight: float | None
) -> None:
    running = begin(recipe(**sections))
    calls: list[tuple[int, float]] = []
    monkeypatch.setattr(
        trainers, "regularize_bins", lambda model, weight: calls.append((running.step, weight))
    )
    finish(running)
    assert calls == ([] if weight is None else [(step, weight) for step in range(7, STEPS)])
