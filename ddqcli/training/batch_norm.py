"""BatchNorm statistics: which layers keep them, and estimating them anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.training import distributed

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> list[Any]:
    """The BatchNorm layers that keep statistics, and in training change them: a network may hold its own fixed."""
    return [
        m
        for m in model.modules()
        if isinstance(m, _BATCH_NORMS) and m.track_running_stats and m.training
    ]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set BatchNorm's running statistics to the plain mean over `batches`, if any, with the weights as they now are.

    A channel that is constant, as one whose weights all take the level 0, gets the mean variance of its layer's others: its
    output stays, and one step of that level, if training goes on, is not blown up by 1 / sqrt(0 + eps).
    """
    model.train()
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    varies: dict[Any, Tensor] = {}

    def look(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values()))).transpose(0, 1).flatten(1)
        varies[norm] = varies.get(norm, False) | (x.amax(1) > x.amin(1))

    hooks = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain mean; what no batch reaches keeps its statistics
        norm.num_batches_tracked.zero_()
    for x, _ in batches if norms else ():
        model(x)
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(distributed.sum_ranks(statistic.clone()) / distributed.shard().count)
    for norm, varied in varies.items():
        live = distributed.sum_ranks(varied.float()) > 0
        norm.running_var[~live] = norm.running_var[live].mean() if live.any() else 1.0
    model.eval()
