"""Looks at a model on held-out training samples, which decide what state a run delivers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.load import Data
from ddqcli.recipe.schema import Recipe
from ddqcli.training import distributed
from ddqcli.training.distillation import distillation, distillation_weight
from ddqcli.training.evaluate import output_of
from ddqcli.training.metrics import Look

# Training has left the region it started in if, against the start,
_RUINED_RISE = 3.0  # the loss is higher by this many times its size, and
_RUINED_POINTS = 5.0  # the accuracy is lower by this many points.


class HeldOut:
    """The held-out training samples, with the loss that training minimizes.

    Args:
        data: of its splits, only `held_out` is read.
        teacher: the float model or another network, for distillation.
        recipe: the share of distillation and its temperature.
    """

    def __init__(self, data: Data, teacher: nn.Module | None, recipe: Recipe) -> None:
        self.data, self.teacher, self.distill = data, teacher, recipe.train.distill
        self.weight = 0.0 if teacher is None else distillation_weight(self.distill, data)
        self._targets: list[Tensor] | None = None

    @torch.no_grad()
    def look(self, model: nn.Module, step: int) -> Look:
        """Return the model's mean loss and score over the samples of all ranks.

        A loss that is not a number counts as infinite. Leaves the model in eval mode.
        """
        model.eval()
        total = torch.zeros(3, dtype=torch.float64)  # loss, score, samples
        for number, (x, y) in enumerate(self.data.held_out.epoch(0)):
            if not len(y):
                continue  # the last batch may have fewer samples than there are ranks
            with parametrize.cached():
                output = output_of(model(x.clone()))  # a network may change its input in place
            loss = float(self._loss(output, y, number))
            score = float(self.data.metric(output.float(), y).double().sum())
            total += torch.tensor([loss * len(y), score, len(y)], dtype=torch.float64)
        loss, score, samples = distributed.sum_ranks(total).tolist()
        return Look(step, math.inf if math.isnan(loss) else loss / samples, 100 * score / samples)

    def _loss(self, output: Any, y: Tensor, number: int) -> Tensor:
        if not self.weight:
            return self.data.loss(output, y)
        target = self._teacher_outputs()[number]
        divergence = distillation(output, target, self.distill.temperature)
        if self.weight == 1:
            return divergence
        return self.weight * divergence + (1 - self.weight) * self.data.loss(output, y)

    def _teacher_outputs(self) -> list[Tensor]:
        """Return the teacher's outputs for each batch, computed once."""
        if self._targets is None:
            assert self.teacher is not None
            batches = self.data.held_out.epoch(0)
            self._targets = [
                output_of(self.teacher(x.clone())).float() if len(x) else x for x, _ in batches
            ]
        return self._targets


def is_better(look: Look, best: Look, start: Look) -> bool:
    """True if `look` has the lowest loss so far, and no lower accuracy than the start."""
    return (
        look.held_out_loss < best.held_out_loss
        and look.held_out_accuracy >= start.held_out_accuracy
    )


def is_ruined(look: Look, start: Look) -> bool:
    """True if training has diverged, though its loss may be finite."""
    rise = look.held_out_loss - start.held_out_loss
    return not math.isfinite(look.held_out_loss) or (
        rise > _RUINED_RISE * abs(start.held_out_loss)  # a user's own loss may be negative
        and look.held_out_accuracy < start.held_out_accuracy - _RUINED_POINTS
    )
