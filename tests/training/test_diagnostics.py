"""Warnings: each problem is named with its remedy, and healthy training gets none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import random_data, trainer
from torch import Tensor, nn

from ddqcli.qat.model import QuantizedParameter
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.report import Course
from ddqcli.training.diagnostics import find_warnings
from ddqcli.training.metrics import Look
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


def course(start: float, trained: float | None = None, looks: int = 9) -> Course:
    """The course of a run on a network of 90 %; `trained` is None if the start is delivered."""
    accuracies = {"float": 90.0, "quantized": start}
    if trained is not None:
        accuracies["trained"] = trained
    return Course.model_validate(
        {
            "stages": [{"name": name, "accuracy": a} for name, a in accuracies.items()],
            "delivered": list(accuracies)[-1],
            "looks": looks,
            "best_step": 0 if trained is None else STEPS,
        }
    )


def weights_of(running: Trainer, name: str) -> QuantizedParameter:
    return next(tensor for tensor in running.quantized.tensors if tensor.name == name)


@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_healthy_training_gets_no_warning(levels: str, granularity: str) -> None:
    running = begin(weights={"max_bits": 3, "levels": levels, "granularity": granularity})
    running.run(lambda _: None, lambda _: None, lambda: None)
    assert find_warnings(running, [], course(80, 85)) == []


# ---- accuracy


@pytest.mark.parametrize(
    ("budget", "remedy"),
    [
        ({"target_bits": 3}, "take a larger budget (now 3 bits)"),
        ({"target_size": "50%"}, "take a larger budget (now 50%)"),
        ({}, "take a larger weights.max_bits (now 4)"),
    ],
)
def test_an_accuracy_far_below_the_float_models_is_reported(
    budget: dict[str, Any], remedy: str
) -> None:
    running = begin(budget=budget)
    (warning,) = find_warnings(running, [], course(50, 79.9))
    assert warning == (
        f"the quantized model is 10.1 points worse than the float model; {remedy}, more training "
        "data, or more train.epochs (now 5)"
    )
    assert find_warnings(running, [], course(50, 80)) == []


def test_training_that_did_not_improve_the_start_says_so() -> None:
    (warning,) = find_warnings(begin(), [], course(85))
    assert warning == (
        "training did not improve the start: 32 training samples may be too few, or train.lr (now "
        "0.0001) does not fit"
    )


def test_a_network_that_answers_all_samples_alike_is_reported() -> None:
    running = begin(budget={"target_bits": 3})
    assert find_warnings(running, [], course(80, 85)) == []
    running.held_out.teacher = nn.Sequential(nn.Flatten(), nn.Linear(108, 10))
    running.model.register_forward_hook(lambda net, x, output: torch.ones_like(output))
    (warning,) = find_warnings(running, [], course(80, 85))
    assert warning == (
        "the outputs are the same for all of 8 held-out samples: the network has collapsed; take a "
        "larger budget (now 3 bits) or a smaller train.lr (now 0.0001)"
    )


def test_a_gain_within_chance_is_reported_and_a_start_as_good_as_float_is_not() -> None:
    running = begin()
    running.best_state.looks = [Look(0, 0.5, 85), Look(4, 0.48, 86), Look(STEPS, 0.49, 86)]
    running.held_out.samples = 100  # chance: 10 %
    (warning,) = find_warnings(running, [], course(85))
    assert warning == (
        "training changed the loss on 100 held-out samples from 0.5 to 0.48, which may be chance, "
        "so the start is delivered: 32 training samples may be too few, or train.lr (now 0.0001) "
        "does not fit"
    )
    assert find_warnings(running, [], course(89.5)) == []
    assert len(find_warnings(running, [], course(89.4))) == 1


def test_a_run_without_training_needs_no_improvement() -> None:
    running = trainer(nn.Sequential(nn.Flatten(), nn.Linear(108, 10)), Recipe(), 0, random_data())
    assert find_warnings(running, [], course(85, looks=1)) == []


def test_a_held_out_loss_that_ended_above_its_first_value_is_reported() -> None:
    running = begin()
    running.best_state.start = Look(0, 0.5, 85)
    running.best_state.best = Look(4, 0.4, 86)
    running.best_state.looks = [
        running.best_state.start,
        running.best_state.best,
        Look(STEPS, 0.625, 86),
    ]
    (warning,) = find_warnings(running, [], course(85, 86))
    assert warning == (
        "the loss on held-out samples ended above its first value (0.5 -> 0.625), and the state of "
        "step 4 is delivered; take a smaller train.lr (now 0.0001)"
    )
    running.best_state.looks[-1] = Look(STEPS, 0.5, 86)
    assert find_warnings(running, [], course(85, 86)) == []


# ---- training


def test_a_rollback_stays_visible_to_the_end() -> None:
    running = begin()
    running.lr_scale = ROLLBACK_LR_SCALE
    (warning,) = find_warnings(running, [])
    assert "training diverged once" in warning
    assert "take a smaller train.lr (now 0.0001)" in warning


def test_training_that_gave_up_says_so_and_which_state_is_delivered() -> None:
    running = begin()
    running.lr_scale, running.gave_up, running.step = ROLLBACK_LR_SCALE, True, 4
    (warning,) = find_warnings(running, [], course(85))
    assert warning == (
        "training diverged twice, the second time at a tenth of the learning rate, and the best "
        "state, of step 4, is delivered; take a smaller train.lr (now 0.0001)"
    )


@pytest.mark.parametrize(
    ("batch_norm", "size", "warned"),
    [("batch", 8, True), ("batch", 9, False), ("held", 8, False), ("auto", 8, False)],
)
def test_batch_norm_on_the_statistics_of_small_batches_is_reported(
    batch_norm: str, size: int, warned: bool
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    recipe = Recipe.model_validate({"train": {"batch_norm": batch_norm}})
    running = trainer(nn.Sequential(*layers), recipe, STEPS, random_data(size=size))
    expected = [
        "BatchNorm trained on the statistics of batches of 8 samples, which are noisy; take "
        "train.batch_norm=held, or a larger data.batch_size"
    ]
    assert find_warnings(running, []) == (expected if warned else [])


def test_the_author_of_a_network_may_keep_its_batch_norm_fixed() -> None:
    class Fixed(nn.Sequential):
        def train(self, mode: bool = True) -> Fixed:
            super().train(mode)
            self[0].eval()
            return self

    model = Fixed(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10))
    recipe = Recipe.model_validate({"train": {"batch_norm": "batch"}})
    assert find_warnings(trainer(model, recipe, STEPS, random_data()), []) == []


# ---- float tensors


def test_a_file_that_is_mostly_float_names_the_largest_tensors_and_why() -> None:
    running = begin(overrides=[{"match": "3", "skip": True}])
    (warning,) = find_warnings(running, [])
    rest = math.ceil(216 * 4 / 8) + 16 + 6 + 8 + 6  # 0.weight and 0.bias, with their tables
    total = 4 * 1290 + rest
    shares = [f"{100 * 4 * size / total:.0f} %" for size in (1290, 1280, 10)]
    assert warning == (
        f"{shares[0]} of the file's bytes stay float, which no bit-width shrinks; the largest: "
        f"3.weight ({shares[1]}: an override says skip), 3.bias ({shares[2]}: an override says "
        "skip)"
    )
    assert find_warnings(begin(weights={"max_bits": 4, "bias_bits": None}), []) == []


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
    assert "take a smaller train.lr (now 0.0001)" in warning


def test_a_layer_that_was_constant_before_is_not_blamed_on_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    model[0].weight.data.fill_(0.1)
    running = trainer(model, Recipe(), STEPS, random_data())
    assert find_warnings(running, []) == []


# ---- idle gates under the paper's rule


class CalledTwice(nn.Module):
    """Calls one layer with inputs of two ranges."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.shared = nn.Linear(108, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).tanh()
        return self.head(self.shared(x) + self.shared(self.factor * x))


@pytest.mark.parametrize(("factor", "warned"), [(100.0, True), (0.01, True), (4.0, False)])
def test_a_layer_called_with_ranges_far_apart_is_named(factor: float, warned: bool) -> None:
    torch.manual_seed(0)
    settings = Recipe.model_validate({"activations": {"bits": 8}, "data": {"batch_size": 8}})
    warnings = find_warnings(trainer(CalledTwice(factor), settings, 0, random_data()), [])
    found = [w for w in warnings if w.startswith("the inputs of shared (from")]
    assert len(found) == warned
    assert not any("first" in w or "head" in w for w in found)
    if warned:
        assert "have ranges 10 times apart or more" in found[0]
        assert "act_bits: 0" in found[0]


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


def test_dbps_that_never_move_are_reported_with_the_remedy() -> None:
    running = begin(budget={"target_bits": 3})
    names = [t.name for t in running.quantized.tensors if not t.fixed]
    lines = metrics(running, 4, 4, 4, 3)
    for line, moving, still in zip(lines[:3], (0.5, 0.2, 0.9), (0.5, 0.52, 0.51), strict=False):
        line["probabilities"] = {names[0]: moving, names[1]: still}
    assert "probabilities" not in lines[3]  # the freeze
    (warning,) = find_warnings(running, lines)
    assert f"the DBP of {names[1]} hardly moved in the " in warning
    assert "take more train.epochs, or a larger gates.freeze (now 0.5)" in warning
    lines[2]["bits"][names[1]] = 3.0  # it has committed, and begun again
    assert find_warnings(running, lines) == []


@pytest.mark.parametrize(("lr", "idle"), [(1e-12, True), (1.0, False)])
def test_the_warning_of_idle_gates_agrees_with_a_real_run(lr: float, idle: bool) -> None:
    running = begin_paper(lr=lr)
    reported: list[dict[str, Any]] = []
    after_backward = running.gates.after_backward

    def report(step: int, loss: Tensor) -> None:
        after_backward(step, loss)
        bits = {
            t.name: sum(t.quantizer.bits) / len(t.quantizer.bits) for t in running.quantized.tensors
        }
        reported.append({"step": step + 1, "bits": bits})

    running.gates.after_backward = report  # type: ignore[method-assign]
    running.run(lambda _: None, lambda _: None, lambda: None)
    warnings = find_warnings(running, reported)
    assert any("no gate moved" in warning for warning in warnings) == idle
