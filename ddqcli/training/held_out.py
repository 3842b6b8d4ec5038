"""Looks at a model on held-out training samples, which decide what state a run delivers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.batches import batch_size
from ddqcli.data.load import Data
from ddqcli.data.seeding import seeded
from ddqcli.data.trees import Tree, as_float32, call, copied
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.evaluation import Metric
from ddqcli.training import distributed
from ddqcli.training.distillation import distillation_weight, training_loss
from ddqcli.training.metrics import Look

# Training has left the region it started in if, against the start,
_RUINED_RISE = 3.0  # the loss is higher by this many times its size, and
_RUINED_POINTS = 5.0  # the metric is worse by this many points, or percent in another unit.


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
        self.samples = 0  # of all ranks, as the last look counted them
        self._targets: list[Tree] | None = None

    @property
    def least_gain(self) -> float:
        """The fall of the loss, relative to the start, that is more than chance.

        The loss of a sample varies by about its mean, so the mean of n samples by 1 / sqrt(n).
        """
        return 1 / math.sqrt(self.samples)

    @property
    def chance_points(self) -> float:
        """The change of an accuracy, in points, that is no more than chance.

        It is the largest standard error that an accuracy over n samples can have, 50 / sqrt(n).
        """
        return 50 / math.sqrt(self.samples)

    @torch.no_grad()
    def look(self, model: nn.Module, step: int) -> Look:
        """Return the model's mean loss and score over the samples of all ranks.

        A loss that is not a number counts as infinite. Leaves the model in eval mode.
        """
        model.eval()
        metric = self.data.judged_by
        total = torch.zeros(4, dtype=torch.float64)  # loss, samples, score, scores
        with parametrize.cached():  # each weight is quantized once for all batches
            for number, batch in enumerate(self.data.held_out.epoch(0)):
                size, (x, y) = batch_size(batch), batch
                if not size:
                    continue  # the last batch may have fewer samples than there are ranks
                with seeded("look", number):
                    output = call(model, copied(x))
                loss = float(self._loss(output, y, number))
                scores = self.data.metric(as_float32(output), y).double()
                total += torch.tensor([loss * size, size, scores.sum(), len(scores)]).double()
        loss, samples, score, count = distributed.sum_ranks(total).tolist()
        self.samples = int(samples)
        mean_loss = math.inf if math.isnan(loss) else loss / samples
        return Look(step, mean_loss, metric.scale * score / count)

    def _loss(self, output: Tree, y: Tree, number: int) -> Tensor:
        target = self._teacher_outputs()[number] if self.weight else None
        return training_loss(self.data, output, y, target, self.weight, self.distill.temperature)

    def _teacher_outputs(self) -> list[Tree]:
        """Return the teacher's outputs for each batch, computed once."""
        if self._targets is None:
            assert self.teacher is not None
            self._targets = [
                as_float32(call(self.teacher, copied(batch[0]))) if batch_size(batch) else None
                for batch in self.data.held_out.epoch(0)
            ]
        return self._targets


def is_better(
    look: Look,
    best: Look,
    start: Look,
    metric: Metric | None = None,
    least_gain: float = 0.0,
    most_points: float = 0.0,
) -> bool:
    """True if `look` has the lowest loss so far, and `metric` is not worse than at the start.

    Args:
        least_gain: share of the start's loss by which the loss must be below it.
        most_points: by which `metric` may be worse; percent in another unit than percent.
    """
    gain = start.held_out_loss - look.held_out_loss
    return (
        look.held_out_loss < best.held_out_loss
        and not gain < least_gain * abs(start.held_out_loss)  # an infinite loss has no share
        and _fall(look, start, metric)
        <= (metric or Metric()).tolerance(most_points, start.held_out_accuracy)
    )


def is_ruined(look: Look, start: Look, metric: Metric | None = None) -> bool:
    """True if training has diverged, though its loss may be finite."""
    rise = look.held_out_loss - start.held_out_loss
    fall = (metric or Metric()).tolerance(_RUINED_POINTS, start.held_out_accuracy)
    return not math.isfinite(look.held_out_loss) or (
        rise > _RUINED_RISE * abs(start.held_out_loss)  # a user's own loss may be negative
        and _fall(look, start, metric) > fall
    )


def _fall(look: Look, start: Look, metric: Metric | None) -> float:
    """Return by how much `metric` is worse than at the start."""
    return (metric or Metric()).drop(start.held_out_accuracy, look.held_out_accuracy)
