"""Optimizers: one for the network's parameters, one for the quantizers' levels and step sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ddqcli.qat.model import QuantizedModel, quantizers
from ddqcli.recipe.schema import TrainSection

_STEP_SIZE_LR = 0.05  # of levels_lr, for the log2 of a learned step size or clip


def make_optimizers(
    quantized: QuantizedModel, train: TrainSection
) -> tuple[Optimizer, Optimizer | None]:
    """Return the optimizers of the network's own parameters and of the quantizers.

    The learning rates must be set, by the recipe or by `training.defaults`.
    The second is None if the quantizers learn nothing. Gates are in neither: their rule moves them.
    Each parameter group keeps its first learning rate as "initial_lr".
    """
    network, levels = _network_optimizer(quantized, train), _levels_optimizer(quantized, train)
    for optimizer in (network, levels):
        for group in optimizer.param_groups if optimizer else ():
            group["initial_lr"] = group["lr"]
    return network, levels


def network_groups(quantized: QuantizedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Return the network's own parameters; decay applies to matrices and kernels alone."""
    of_quantizers = {id(p) for quantizer in quantizers(quantized) for p in quantizer.parameters()}
    own = [
        p for p in quantized.model.parameters() if id(p) not in of_quantizers and p.requires_grad
    ]
    return _without_empty(
        {"params": [p for p in own if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    )


def level_groups(quantized: QuantizedModel, levels_lr: float) -> list[dict[str, Any]]:
    """Return the learned levels, and the learned step sizes and clips, for an Adam optimizer.

    `levels_lr` is in units of the level grid, 1/255 of a tensor's range.
    """
    learned = {
        id(p): (name, p)
        for quantizer in quantizers(quantized)
        for name, p in quantizer.named_parameters()
        if p.requires_grad
    }
    levels = [p for name, p in learned.values() if name.endswith("levels")]
    step_sizes = [p for name, p in learned.values() if "log2" in name]
    return _without_empty(
        {"params": levels, "lr": levels_lr},
        {"params": step_sizes, "lr": levels_lr * _STEP_SIZE_LR},
    )


def _network_optimizer(quantized: QuantizedModel, train: TrainSection) -> Optimizer:
    groups = network_groups(quantized, train.weight_decay)
    assert train.lr is not None
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=train.lr, fused=True)


def _levels_optimizer(quantized: QuantizedModel, train: TrainSection) -> Optimizer | None:
    """Adam, so that the learning rate is the size of a step, in units of the level grid."""
    groups = level_groups(quantized, train.levels_lr)
    return torch.optim.Adam(groups, fused=True) if groups else None


def _without_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
