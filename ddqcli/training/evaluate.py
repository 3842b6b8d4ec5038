"""Evaluation on held-out data, and outputs to compare an exported model with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ddqcli.data.batches import batch_size, take_samples, tree_to_device
from ddqcli.data.load import Data
from ddqcli.data.trees import call, copied, is_plain, tensors
from ddqcli.errors import DataError
from ddqcli.training import distributed
from ddqcli.training.divergence import require_finite_batch

_PROBE_SAMPLES = 8
OnProgress = Callable[[str, int, int], None]  # (activity, batches done, batches in all)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, *, on_progress: OnProgress | None = None) -> float:
    """Return the mean of the metric over all held-out samples, in its unit.

    Leaves the model in eval mode. Each rank evaluates its shard; the result is the same on all of
    them. Raises DataError for inputs that are not finite and, naming samples, for such scores.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # of scores, and their number
    invalid: list[int] = []
    with parametrize.cached():  # each weight is quantized once for all batches
        for done, batch in enumerate(data.val.epoch(0)):
            if not batch_size(batch):
                continue  # the last batch may have fewer samples than there are ranks
            inputs, targets = batch
            require_finite_batch(inputs, done, "evaluation")
            scores = data.metric(call(model, inputs), targets).double().cpu()
            invalid += (int(total[1]) + (~scores.isfinite()).nonzero()[:, 0]).tolist()
            total += torch.tensor([scores.sum(), len(scores)], dtype=torch.float64)
            if on_progress:
                on_progress("evaluate", done + 1, len(data.val))
    scores_sum, count = distributed.sum_ranks(total).tolist()
    if not math.isfinite(scores_sum):
        raise _not_finite(data, invalid, int(count))
    return float(data.judged_by.scale * scores_sum / count)


def _not_finite(data: Data, invalid: list[int], count: int) -> DataError:
    """Return the error for scores of evaluation samples that are NaN or infinite."""
    named = ", ".join(map(str, invalid[:8])) + ", ..." * (len(invalid) > 8)
    return DataError(
        f"The metric {data.judged_by.name} is NaN or infinite for {len(invalid)} of {count:,} "
        f"evaluation samples (number {named}); give it a value for every sample, or leave these "
        "out of val."
    )


@torch.no_grad()
def probe(model: nn.Module, data: Data) -> dict[str, Any] | None:
    """Return the first held-out inputs and the model's outputs, as "input" and "output" on the CPU.

    A model that is loaded again can be compared with them. The input is a tree, the output a list
    of tensors. None if the output holds no tensor, or if a file cannot store the input.
    """
    model.eval()
    batch = take_samples(next(iter(data.val.epoch(0))), slice(_PROBE_SAMPLES))
    inputs, _ = batch
    outputs = tensors(call(model, copied(inputs)))
    if not (outputs and is_plain(inputs)):
        return None
    cpu = torch.device("cpu")
    return {"input": tree_to_device(inputs, cpu), "output": tree_to_device(outputs, cpu)}
