"""A trial of the data before a run: one batch of each kind through the float model and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from ddqcli.data.batches import Batch, Batches
from ddqcli.data.load import Data
from ddqcli.data.trees import all_finite, call, copied, map_tensors
from ddqcli.errors import DataError
from ddqcli.recipe.schema import DistillSection
from ddqcli.training.distillation import distillation_weight, training_loss
from ddqcli.training.divergence import explain_loss
from ddqcli.training.evaluate import evaluate


class _FirstBatch:
    """The first of some batches."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.samples = batches, batches.samples

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return islice(self.batches.epoch(epoch, start), 1)

    def fingerprint(self) -> str:
        return self.batches.fingerprint()


def try_data(model: nn.Module, data: Data, distill: DistillSection) -> float:
    """Return the float model's metric on the first evaluation batch; compute a training loss.

    Raises DataError for scores that are not finite, and as `try_loss`.
    """
    score = evaluate(model, replace(data, val=_FirstBatch(data.val)))
    try_loss(model, data, distill)
    return score


@torch.no_grad()
def try_loss(model: nn.Module, data: Data, distill: DistillSection) -> None:
    """Compute the loss of the float model on the first training batch.

    Raises DataError for inputs that are not finite, DDQError for such a loss, and what the network
    and the functions of the data raise.
    """
    inputs, targets = next(iter(data.train.epoch(0)))
    output = call(model, copied(inputs))
    weight = distillation_weight(distill, data)
    with torch.enable_grad():
        trained = map_tensors(_with_gradient, output)
        loss = training_loss(data, trained, targets, output, weight, distill.temperature).item()
    if not all_finite(inputs):
        raise DataError("The first training batch holds NaN or infinite values; repair the data.")
    if not math.isfinite(loss):
        raise explain_loss(model, inputs, loss, "in the first training batch")


def _with_gradient(x: Tensor) -> Tensor:
    """Return the tensor as training gives it to the loss; a loss may change it in place."""
    return x.detach().requires_grad_().clone() if x.is_floating_point() else x
