"""Evaluation on held-out data, and outputs to compare an exported model with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.load import Data
from ddqcli.training import distributed

_PROBE_SAMPLES = 8
OnProgress = Callable[[str, int, int], None]  # (activity, batches done, batches in all)


def output_of(result: Any) -> Any:
    """Return the main output of a model that returns several in train mode.

    torchvision's GoogLeNet and Inception do.
    """
    return result.logits if hasattr(result, "logits") else result


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, *, on_progress: OnProgress | None = None) -> float:
    """Return the mean metric over all held-out samples, in percent. Leaves the model in eval mode.

    Each rank evaluates its shard; the result is the same on all of them.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for done, (x, y) in enumerate(data.val.epoch(0)):
        if not len(x):
            continue  # the last batch may have fewer samples than there are ranks
        with parametrize.cached():
            scores = data.metric(output_of(model(x)), y)
        total += scores.double().sum().cpu()
        if on_progress:
            on_progress("evaluate", done + 1, len(data.val))
    return 100 * float(distributed.sum_ranks(total)) / data.val.samples


@torch.no_grad()
def probe(model: nn.Module, data: Data) -> dict[str, Tensor] | None:
    """Return the first held-out inputs and the model's outputs, as "input" and "output" on the CPU.

    A model that is loaded again can be compared with them. None if the output is not a tensor.
    """
    model.eval()
    x = next(iter(data.val.epoch(0)))[0][:_PROBE_SAMPLES]
    output = output_of(model(x.clone()))  # a network may change its input in place
    return {"input": x.cpu(), "output": output.cpu()} if isinstance(output, Tensor) else None


def sample_differences(actual: Tensor, expected: Tensor) -> Tensor:
    """Return each sample's relative error [B].

    It is the root mean square of the sample's difference over the root mean square of all expected
    values; 0 for equal samples, also of NaN or of zeros alone, and infinite for other NaN.
    """
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    relative = (actual - expected).square().mean(1).sqrt() / expected.square().mean().sqrt()
    return torch.where(same.all(1), 0.0, relative.nan_to_num(nan=torch.inf, posinf=torch.inf))
