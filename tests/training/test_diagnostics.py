"""Warnings: each problem is named with its remedy, and healthy training gets none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_data, trainer
from torch import nn

from ddqcli.qat.model import QuantizedParameter
from ddqcli.recipe.schema import Recipe
from ddqcli.training.diagnostics import find_warnings
from ddqcli.training.session import ROLLBACK_LR_SCALE
from ddqcli.training.trainer import Trainer

STEPS = 12


def begin(**sections: Any) -> Trainer:
    """A trainer at its first step, with 4 bits for each tensor unless `sections` differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    recipe = Recipe.model_validate(
        {"weights": {"max_bits": 4}, "data": {"batch_size": 8}, **sections}
    )
    return trainer(model, recipe, STEPS, random_data())


def weights_of(running: Trainer, name: str) -> QuantizedParameter:
    return next(tensor for tensor in running.quantized.tensors if tensor.name == name)


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_healthy_training_gets_no_warning(levels: str, granularity: str) -> None:
    running = begin(weights={"max_bits": 3, "levels": levels, "granularity": granularity})
    running.run(lambda _: None, lambda: None)
    assert find_warnings(running, []) == []


def test_a_rollback_stays_visible_to_the_end() -> None:
    running = begin()
    running.lr_scale = ROLLBACK_LR_SCALE
    (warning,) = find_warnings(running, [])
    assert "training diverged once" in warning
    assert "take a smaller train.lr (now 0.01)" in warning


# ---- unused levels


def test_levels_that_no_weight_takes_are_named_and_counted() -> None:
    running = begin()
    tensor = weights_of(running, "3.weight")
    # None is left in the lower half of the levels.
    tensor.parameter.data.copy_(tensor.quantizer(tensor.parameter).detach().abs())
    used = len(tensor.quantizer(tensor.parameter).unique())
    (warning,) = find_warnings(running, [])
    unused = f"levels that no weight takes cost bytes for nothing in 3.weight ({16 - used} of 16)"
    assert unused in warning
    assert "take a smaller train.levels_lr (now 0.1)" in warning


def test_a_tensor_of_few_values_is_not_warned_of_unused_levels() -> None:
    running = begin(weights={"max_bits": 7})
    tensor = weights_of(running, "0.weight")  # 216 values, 128 levels
    tensor.parameter.data.copy_(tensor.parameter.abs())
    assert find_warnings(running, []) == []


# ---- constant layers


def test_a_layer_that_became_constant_is_named() -> None:
    running = begin(weights={"max_bits": 8})
    weights_of(running, "0.weight").parameter.data.fill_(0.1)
    (warning,) = find_warnings(running, [])
    assert warning.startswith("every value of 0.weight is the same after quantization")
    assert "take a smaller train.lr (now 0.01)" in warning


def test_a_layer_that_was_constant_before_is_not_blamed_on_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    model[0].weight.data.fill_(0.1)
    running = trainer(model, Recipe(), STEPS, random_data())
    assert find_warnings(running, []) == []


# ---- idle gates under the paper's rule


def begin_paper(**gates: Any) -> Trainer:
    return begin(
        weights={"max_bits": 4}, budget={"target_bits": 3}, gates={"rule": "paper", **gates}
    )


def metrics(running: Trainer, *bits: int) -> list[dict[str, Any]]:
    """Metrics at the steps 1, 2, ... that report these bits for every weight."""
    kinds = {tensor.name: tensor.kind for tensor in running.quantized.tensors}
    return [
        {
            "step": step,
            "bits": {name: 8.0 if kind == "bias" else float(s) for name, kind in kinds.items()},
        }
        for step, s in enumerate(bits, 1)
    ]


def test_gates_that_never_move_are_reported_with_the_remedy() -> None:
    running = begin_paper()
    (warning,) = find_warnings(running, metrics(running, 4, 4, 4, 4, 4, 4, 3, 3))
    assert "no gate moved in the 6 steps before the gates froze" in warning
    assert "raise gates.lr (now 1e-08), or take gates.rule=fisher, which needs no tuning" in warning


@pytest.mark.parametrize("bits", [(4, 4, 3, 3, 3, 3), (3, 3, 3, 3, 3, 3)])
def test_gates_that_moved_are_not_reported(bits: tuple[int, ...]) -> None:
    """Bits below the maximum from the first report on moved before it."""
    running = begin_paper()
    assert find_warnings(running, metrics(running, *bits)) == []


@pytest.mark.parametrize(("lr", "idle"), [(1e-12, True), (1.0, False)])
def test_the_warning_of_idle_gates_agrees_with_a_real_run(lr: float, idle: bool) -> None:
    running = begin_paper(lr=lr)
    reported: list[dict[str, Any]] = []
    after_backward = running.gates.after_backward

    def report(step: int, loss: float) -> None:
        after_backward(step, loss)
        bits = {
            t.name: sum(t.quantizer.bits) / len(t.quantizer.bits) for t in running.quantized.tensors
        }
        reported.append({"step": step + 1, "bits": bits})

    running.gates.after_backward = report  # type: ignore[method-assign]
    running.run(lambda _: None, lambda: None)
    warnings = find_warnings(running, reported)
    assert any("no gate moved" in warning for warning in warnings) == idle
