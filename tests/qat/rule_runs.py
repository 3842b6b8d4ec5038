"""Runs of the rules on a small network, and the budget's promise, counted independently."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from small_models import RandomBatches, random_data, trainer
from torch import nn

from ddqcli.artifact.encode import encode_artifact
from ddqcli.data.load import Data
from ddqcli.qat.budget import make_budget
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.base import Rule
from ddqcli.qat.rules.registry import make_rule
from ddqcli.recipe.schema import Recipe
from ddqcli.training.trainer import Trainer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 40),
        nn.Linear(40, 10),
    )


def rule_recipe(rule: str, budget: dict[str, Any] | None, **sections: Any) -> Recipe:
    chosen = {"method": "sdq"} if rule == "sdq" else {}
    gates = {"rule": "fisher" if chosen else rule, "looks": 2, **sections.pop("gates", {})}
    return Recipe.model_validate(
        {"gates": gates, "budget": budget or {}, "data": {"batch_size": 8}, **chosen, **sections}
    )


def rule_of(
    recipe: Recipe,
    model: nn.Module | QuantizedModel | None = None,
    *,
    steps: int = 10,
    batch_size: int = 8,
) -> Rule:
    """The recipe's rule, before its start, for a model that has seen no data."""
    if not isinstance(model, QuantizedModel):
        model = convert(model or network(), recipe)
    budget = make_budget(model, recipe)
    return make_rule(recipe.rule, model, recipe, budget, steps, batch_size)


def few_looks() -> Data:
    """Random data of which looks see one batch: what they see is no matter to a rule."""
    few = RandomBatches(count=1)
    return replace(random_data(), held_out=few, val=few)


def finished_run(
    recipe: Recipe, steps: int, model: nn.Module | None = None
) -> tuple[Trainer, list[tuple[int, ...]]]:
    """A run at its last state, and the bits of all groups after each step."""
    running = trainer(model or network(), recipe, steps, few_looks())
    history: list[tuple[int, ...]] = []
    after_backward = running.gates.after_backward

    def watched(step: int, loss: float) -> None:
        after_backward(step, loss)
        history.append(bits_in_force(running.gates.model))

    running.gates.after_backward = watched  # type: ignore[method-assign]
    running.restore_best = lambda: True  # type: ignore[method-assign]
    running.run(lambda metrics: None, lambda look: None, lambda: None)
    return running, history


def bits_in_force(model: QuantizedModel) -> tuple[int, ...]:
    return tuple(s for t in model.tensors for s in t.quantizer.bits)


def expected_cost(
    model: QuantizedModel, bits: dict[str, int] | None = None, eqn6: bool = False
) -> int:
    """The cost by its definition: per tensor the packed indices, per group 2^s levels, scale, zero
    point and gates."""
    total = 0
    for tensor in model.tensors:
        groups = [bits[tensor.name]] * len(tensor.quantizer.bits) if bits else tensor.quantizer.bits
        size = tensor.parameter.numel() // len(groups)
        if eqn6:
            total += sum(size * 2**s for s in groups)
        else:
            total += math.ceil(sum(size * s for s in groups) / 8)
            total += sum((2**s if s < 8 else 0) + 6 for s in groups)
    return total


def fewest_bits(model: QuantizedModel) -> dict[str, int]:
    return {t.name: t.min_bits for t in model.tensors}


def float_bytes(model: QuantizedModel) -> int:
    """The bytes of what stays float and is stored: BatchNorm's statistics are not."""
    return sum(
        value.numel() * value.element_size()
        for name, value in model.float_tensors().items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )


def file_bytes(model: QuantizedModel) -> int:
    """The bytes of the file with this model and no report."""
    frozen = FrozenModel.from_state(freeze(model))
    parts = frozen.quantized, frozen.activations, frozen.floats, frozen.aliases
    return len(encode_artifact(*parts, {}, frozen.constants)[0])


def assert_budget_kept(
    model: QuantizedModel, limit: int | None, *, used: bool = True, eqn6: bool = False
) -> None:
    """The bits fit the limit and the gates; with `used`, 2 % may stay idle, or what fits no bit."""
    assert limit is not None
    cost = expected_cost(model, eqn6=eqn6)
    assert cost <= limit
    for tensor in model.tensors:
        bits = tensor.quantizer.bits
        assert all(tensor.min_bits <= s <= tensor.max_bits for s in bits)
        assert tensor.quantizer(tensor.parameter).unique().numel() <= sum(2**s for s in bits)
        assert ((tensor.quantizer.gate_logits >= 0).sum(1) == torch.tensor(bits)).all()
    if used and cost < 0.98 * limit:
        now = {t.name: max(t.quantizer.bits) for t in model.tensors}
        rises = [
            {**now, t.name: now[t.name] + 1} for t in model.tensors if now[t.name] < t.max_bits
        ]
        assert all(expected_cost(model, bits, eqn6) > limit for bits in rises), (
            "one more bit would have fitted"
        )
