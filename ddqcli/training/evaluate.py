"""Accuracy on held-out data, and outputs to compare an exported model with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.load import Data
from ddqcli.training import distributed

_PROBE = 8  # samples
OnProgress = Callable[[str, int, int], None]  # what is going on, done, total


def output_of(result: Any) -> Any:
    """The main output of a model that returns several while training (torchvision's GoogLeNet and Inception)."""
    return result.logits if hasattr(result, "logits") else result


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, *, on_progress: OnProgress | None = None) -> float:
    """Mean of the metric over every held-out sample once, in percent."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for done, (x, y) in enumerate(data.val.epoch(0)):
        if not len(x):
            continue  # a last batch with fewer samples than there are processes
        with parametrize.cached():
            scores = data.metric(output_of(model(x)), y)
        total += scores.double().sum().cpu()
        if on_progress:
            on_progress("evaluate", done + 1, len(data.val))
    return 100 * float(distributed.sum_ranks(total)) / data.val.samples


@torch.no_grad()
def probe(model: nn.Module, data: Data) -> dict[str, Tensor] | None:
    """The first held-out inputs and what the model makes of them, to compare a loaded one with; None for no tensor."""
    model.eval()
    x = next(iter(data.val.epoch(0)))[0][:_PROBE]
    output = output_of(model(x.clone()))  # a network may change its input in place
    return {"input": x.cpu(), "output": output.cpu()} if isinstance(output, Tensor) else None


def sample_differences(found: Tensor, expected: Tensor) -> Tensor:
    """[B]: root mean square of each sample's difference, as a share of that of all expected values; infinite for NaN."""
    error = (found.double() - expected.double()).flatten(1).square().mean(1).sqrt()
    return (error / expected.double().square().mean().sqrt()).nan_to_num(nan=torch.inf) * (
        error != 0
    )
