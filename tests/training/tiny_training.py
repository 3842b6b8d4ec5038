"""A network that trains in a second, and helpers to run, stop, store and compare its training."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from small_models import random_data, trainer
from torch import Tensor, nn

from ddqcli.recipe.schema import Recipe
from ddqcli.training.metrics import StepMetrics
from ddqcli.training.trainer import Trainer

STEPS = 11  # with 4 batches an epoch


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    )


def recipe(**sections: Any) -> Recipe:
    """3 bits, gates frozen at step 7, a checkpoint every 3 steps, no distillation.

    SGD and BatchNorm on batch statistics, from the quantized model as it is.
    """
    gates = {"looks": 3, "freeze": 0.7, **sections.pop("gates", {})}
    train = {
        "compensate": False,
        "optimizer": "sgd",
        "lr": 0.05,
        "batch_norm": "batch",
        "save_every": 3,
        "distill": {"weight": 0},
        **sections.pop("train", {}),
    }
    base = {"budget": {"target_bits": 3}, "gates": gates, "train": train, "data": {"batch_size": 8}}
    return Recipe.model_validate({**base, **sections})


def begin(recipe: Recipe, steps: int = STEPS, seed: int = 0, device: str = "cpu") -> Trainer:
    """A trainer at its first step, with another network as the float model."""
    teacher = network().to(device).eval().requires_grad_(False)
    return trainer(network(seed).to(device), recipe, steps, random_data(device=device), teacher)


def finish(running: Trainer) -> list[StepMetrics]:
    """Run to the end; return the metrics."""
    metrics: list[StepMetrics] = []
    running.run(metrics.append, lambda look: None, lambda: None)
    return metrics


def finish_at_last(running: Trainer) -> list[StepMetrics]:
    """Run to the end and stay there, even if an earlier state was better; return the metrics."""
    running.restore_best = lambda: True  # type: ignore[method-assign]
    return finish(running)


def before_each_step(running: Trainer, call: Callable[[int], object]) -> None:
    """Call `call` with the number of each step before it begins."""
    before_step = running.gates.before_step

    def called(step: int) -> None:
        call(step)
        before_step(step)

    running.gates.before_step = called  # type: ignore[method-assign]


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """A state as torch.load reads it from disk."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two states differ in any bit."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{path}.{n}")]
    return [] if one == other else [path]
