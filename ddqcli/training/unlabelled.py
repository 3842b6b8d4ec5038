"""Data without labels: the float model's outputs stand for the targets of their evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ddqcli.data.batches import Batch, Batches, batch_size
from ddqcli.data.distance import DISTANCE, sample_differences
from ddqcli.data.load import Data
from ddqcli.data.trees import call, copied


def is_labelled(data: Data) -> bool:
    """True if the batches of the data have targets."""
    _, targets = next(iter(data.val.epoch(0)))
    return targets is not None


def with_float_targets(data: Data, teacher: nn.Module) -> Data:
    """Return data without labels with the float model's outputs as targets of their evaluation.

    A metric of their own gets these targets; without one, the distance from them is the metric.
    """
    held_out, val = (_FloatTargets(part, teacher) for part in (data.held_out, data.val))
    data = replace(data, held_out=held_out, val=val, labelled=False)
    if data.own_metric:
        return data
    return replace(data, metric=sample_differences, judged_by=DISTANCE)


class _FloatTargets:
    """Batches whose targets are the float model's outputs for them."""

    def __init__(self, batches: Batches, teacher: nn.Module) -> None:
        self.batches, self.teacher, self.samples = batches, teacher, batches.samples

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Batch:
        inputs, _ = batch
        return inputs, call(self.teacher, copied(inputs)) if batch_size(batch) else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... of an epoch, on the device."""
        return map(self._outputs, self.batches.epoch(epoch, start))

    def fingerprint(self) -> str:
        return self.batches.fingerprint()
