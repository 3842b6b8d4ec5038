"""BatchNorm statistics: the layers that keep them, and their re-estimation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.batches import Batch
from ddqcli.data.trees import call
from ddqcli.training import distributed

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm layers that update running statistics.

    A layer in eval mode is left out: a network may keep its own BatchNorm fixed while it trains.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _BATCH_NORMS) and module.track_running_stats and module.training
    ]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set BatchNorm's running statistics to their mean over `batches`, with the current weights.

    Layers that no batch reaches keep their statistics. A constant channel (all of its weights take
    the level 0) gets the mean variance of its layer's other channels. Its output stays the same,
    and if training continues, one step of that level is not magnified by 1 / sqrt(0 + eps).
    Leaves the model in eval mode.
    """
    model.train()
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    varies: dict[Any, Tensor] = {}  # by layer: [C], True for a channel that is not constant

    def observe(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values()))).transpose(0, 1).flatten(1)
        varies[norm] = varies.get(norm, False) | (x.amax(1) > x.amin(1))

    hooks = [norm.register_forward_pre_hook(observe, with_kwargs=True) for norm in norms]
    for norm in norms:
        norm.momentum = None  # cumulative mean
        norm.num_batches_tracked.zero_()
    with parametrize.cached():  # each weight is quantized once for all batches
        for x, _ in batches if norms else ():
            call(model, x)
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(distributed.sum_ranks(statistic.clone()) / distributed.shard().count)
    for norm, channel_varies in varies.items():
        live = distributed.sum_ranks(channel_varies.float()) > 0
        norm.running_var[~live] = norm.running_var[live].mean() if live.any() else 1.0
    model.eval()
