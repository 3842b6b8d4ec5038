"""One optimizer for the network's parameters, one for levels and step sizes."""

from __future__ import annotations

import torch

from ddqcli.qat.model import QuantizedModel, quantizers
from ddqcli.recipe.schema import TrainSection

_STEP_LR = 0.05  # log2 of a learned step or clip moves by this share of levels_lr


def make_optimizers(
    converted: QuantizedModel, train: TrainSection
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """One for the network's own parameters, one (Adam: its steps are in units of the level grid) for the quantizers'."""
    of_quantizers = {id(p) for q in quantizers(converted) for p in q.parameters()}
    own = [
        p for p in converted.model.parameters() if id(p) not in of_quantizers and p.requires_grad
    ]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if train.optimizer == "sgd":
        first: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=train.lr, momentum=train.momentum, fused=True
        )
    else:
        first = torch.optim.AdamW(groups, lr=train.lr, fused=True)
    learned = {
        id(p): (n, p)
        for q in quantizers(converted)
        for n, p in q.named_parameters()
        if p.requires_grad
    }
    levels = [p for n, p in learned.values() if n.endswith("levels")]
    scales = [p for n, p in learned.values() if "log2" in n]
    groups = [
        {"params": levels, "lr": train.levels_lr},
        {"params": scales, "lr": train.levels_lr * _STEP_LR},
    ]
    groups = [g for g in groups if g["params"]]
    second = torch.optim.Adam(groups, fused=True) if groups else None
    for optimizer in (first, second):
        for group in optimizer.param_groups if optimizer else ():
            group["initial_lr"] = group["lr"]
    return first, second
