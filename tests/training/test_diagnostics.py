"""Warnings: each kind of trouble is named with its remedy, and healthy training gets none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_data, trainer
from torch import nn

from ddqcli.recipe.schema import Recipe
from ddqcli.training.diagnostics import ROLLED_BACK, find_warnings
from ddqcli.training.trainer import Trainer

STEPS = 12


def begun(**sections: Any) -> Trainer:
    """A run that is ready to start, with 4 bits for each tensor unless told otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    recipe = Recipe.model_validate(
        {"weights": {"max_bits": 4}, "data": {"batch_size": 8}, **sections}
    )
    return trainer(model, recipe, STEPS, random_data())


def weights_of(running: Trainer, name: str) -> Any:
    return next(tensor for tensor in running.converted.tensors if tensor.name == name)


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_healthy_training_gets_no_warning(levels: str, granularity: str) -> None:
    running = begun(weights={"max_bits": 3, "levels": levels, "granularity": granularity})
    running.run(lambda _: None, lambda: None)
    assert find_warnings(running, []) == []


def test_levels_that_no_weight_takes_are_named_and_counted() -> None:
    running = begun()
    tensor = weights_of(running, "3.weight")
    half = (
        tensor.quantizer(tensor.parameter).detach().abs()
    )  # none is left in the lower half of the levels
    tensor.parameter.data.copy_(half)
    used = len(tensor.quantizer(tensor.parameter).unique())
    (warning,) = find_warnings(running, [])
    assert (
        f"levels that no weight takes cost bytes for nothing in 3.weight ({16 - used} of 16)"
        in warning
    )
    assert "train.levels_lr (now 0.1)" in warning


def test_a_tensor_of_few_values_is_not_blamed_for_unused_levels() -> None:
    running = begun(weights={"max_bits": 7})
    tensor = weights_of(running, "0.weight")  # 216 values, 128 levels
    tensor.parameter.data.copy_(tensor.parameter.abs())
    assert find_warnings(running, []) == []


def test_a_layer_that_became_constant_is_named() -> None:
    running = begun(weights={"max_bits": 8})
    weights_of(running, "0.weight").parameter.data.fill_(0.1)
    (warning,) = find_warnings(running, [])
    assert warning.startswith("every value of 0.weight is the same after quantization")
    assert "train.lr (now 0.01)" in warning


def test_a_layer_that_was_constant_before_is_not_blamed_on_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    model[0].weight.data.fill_(0.1)
    running = trainer(model, Recipe(), STEPS, random_data())
    assert find_warnings(running, []) == []


def gates_of_the_paper(**gates: Any) -> Trainer:
    return begun(
        weights={"max_bits": 4}, budget={"target_bits": 3}, gates={"rule": "paper", **gates}
    )


def metrics(running: Trainer, *bits: int) -> list[dict[str, Any]]:
    """What the run would report at the steps 1, 2, ...: these bits of every weight."""
    names = [(t.name, t.kind) for t in running.converted.tensors]
    return [
        {"step": step, "bits": {name: 8.0 if kind == "bias" else float(s) for name, kind in names}}
        for step, s in enumerate(bits, 1)
    ]


def test_gates_that_never_move_under_the_papers_rule_are_told() -> None:
    running = gates_of_the_paper()
    (warning,) = find_warnings(running, metrics(running, 4, 4, 4, 4, 4, 4, 3, 3))
    assert "no gate moved in the 6 steps before the gates froze" in warning
    assert "raise gates.lr (now 1e-08), or take gates.rule=fisher" in warning


def test_gates_that_moved_are_not_told_of() -> None:
    running = gates_of_the_paper()
    assert find_warnings(running, metrics(running, 4, 4, 3, 3, 3, 3)) == []


def test_the_warning_on_gates_agrees_with_a_real_run() -> None:
    for lr, idle in ((1e-12, True), (1.0, False)):
        running = gates_of_the_paper(lr=lr)
        reported: list[dict[str, Any]] = []
        after = running.gates.after_backward

        def noting(
            step: int,
            loss: float,
            running: Trainer = running,
            after: Any = after,
            reported: Any = reported,
        ) -> None:
            after(step, loss)
            bits = {
                t.name: sum(t.quantizer.bits) / len(t.quantizer.bits)
                for t in running.converted.tensors
            }
            reported.append({"step": step + 1, "bits": bits})

        running.gates.after_backward = noting
        running.run(lambda _: None, lambda: None)
        assert (
            any("no gate moved" in warning for warning in find_warnings(running, reported)) == idle
        )


def test_a_roll_back_stays_visible_to_the_end() -> None:
    running = begun()
    running.lr_scale = ROLLED_BACK
    (warning,) = find_warnings(running, [])
    assert "training diverged once" in warning
