"""Evaluation on held-out data, and outputs to compare an exported model with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.batches import batch_size, take_samples, tree_to_device
from ddqcli.data.classification import Score
from ddqcli.data.load import Data
from ddqcli.data.seeding import seeded
from ddqcli.data.trees import Tree, call, copied, is_plain, plain_arguments, tensors
from ddqcli.errors import DataError
from ddqcli.runs.evaluation import Metric
from ddqcli.training import distributed
from ddqcli.training.divergence import require_finite_batch

_PROBE_SAMPLES = 8
OnProgress = Callable[[str, int, int], None]  # (activity, batches done, batches in all)


def evaluate(model: nn.Module, data: Data, *, on_progress: OnProgress | None = None) -> float:
    """Return the mean of the metric over all held-out samples, in its unit; as `evaluate_all`."""
    return evaluate_all(model, replace(data, others=()), on_progress=on_progress)[0]


@torch.no_grad()
def evaluate_all(
    model: nn.Module, data: Data, *, on_progress: OnProgress | None = None
) -> list[float]:
    """Return each metric's mean over all held-out samples in its unit; the first one judges.

    Leaves the model in eval mode. Each rank evaluates its shard; the result is the same on all of
    them. Raises DataError for inputs that are not finite and, naming samples, for such scores.
    """
    model.eval()
    totals = [_Total(*each) for each in ((data.metric, data.judged_by), *data.others)]
    with parametrize.cached():  # each weight is quantized once for all batches
        for done, batch in enumerate(data.val.epoch(0)):
            if not batch_size(batch):
                continue  # the last batch may have fewer samples than there are ranks
            inputs, targets = batch
            require_finite_batch(inputs, done, "evaluation")
            with seeded("evaluate", done):  # some networks draw numbers in eval mode, too
                output = call(model, inputs)
            for total in totals:
                total.add(output, targets)
            if on_progress:
                on_progress("evaluate", done + 1, len(data.val))
    return [total.mean() for total in totals]


class _Total:
    """The sum of a metric's scores over evaluation samples."""

    def __init__(self, function: Score, metric: Metric) -> None:
        self.function, self.metric = function, metric
        self.total = torch.zeros(2, dtype=torch.float64)  # of scores, and their number
        self.invalid: list[int] = []  # samples

    def add(self, output: Tree, targets: Tree) -> None:
        """Add the scores of a batch."""
        scores = self.function(output, targets).double().cpu()
        self.invalid += (int(self.total[1]) + (~scores.isfinite()).nonzero()[:, 0]).tolist()
        self.total += torch.tensor([scores.sum(), len(scores)], dtype=torch.float64)

    def mean(self) -> float:
        """Return the mean of all ranks in the unit. Raises DataError if it is not finite."""
        scores, count = distributed.sum_ranks(self.total).tolist()
        if math.isfinite(scores):
            return float(self.metric.scale * scores / count)
        named = ", ".join(map(str, self.invalid[:8])) + ", ..." * (len(self.invalid) > 8)
        raise DataError(
            f"The metric {self.metric.name} is NaN or infinite for {len(self.invalid)} of "
            f"{int(count):,} evaluation samples (number {named}); give it a value for every "
            "sample, or leave these out of val."
        )


@torch.no_grad()
def probe_outputs(model: nn.Module, inputs: Tree) -> list[Tensor]:
    """Return the tensors of the model's output, the same each time if it draws random numbers."""
    with seeded("probe"):
        return tensors(call(model, copied(inputs)))


@torch.no_grad()
def probe(model: nn.Module, data: Data) -> dict[str, Any] | None:
    """Return the first held-out inputs and the model's outputs, as "input" and "output" on the CPU.

    A model that is loaded again can be compared with them. The input is a tree, the output a list
    of tensors. None if the output holds no tensor, or if a file cannot store the input.
    """
    model.eval()
    batch = take_samples(next(iter(data.val.epoch(0))), slice(_PROBE_SAMPLES))
    inputs = plain_arguments(batch[0])
    outputs = probe_outputs(model, inputs)
    if not (outputs and is_plain(inputs)):
        return None
    cpu = torch.device("cpu")
    return {"input": tree_to_device(inputs, cpu), "output": tree_to_device(outputs, cpu)}
