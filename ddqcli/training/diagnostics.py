"""What a finished training should not hide: levels without weights, layers that became constant, gates that never moved."""

from __future__ import annotations

from typing import Any

import torch

from ddqcli.qat.model import QuantizedParameter
from ddqcli.training.trainer import Trainer

ROLLED_BACK = 0.1  # of the step size, after training diverged
_MANY = 0.25  # share of dead levels worth a word
_ENOUGH = 4  # values a level, from which on each level should have some


def find_warnings(trainer: Trainer, metrics: list[dict[str, Any]]) -> list[str]:
    """One sentence for each thing that went wrong, with its remedy; `metrics` are all that the run reported."""
    found = [
        _rolled_back(trainer),
        _collapsed(trainer),
        _dead_levels(trainer),
        _idle_gates(trainer, metrics),
    ]
    return [warning for warning in found if warning]


def _rolled_back(trainer: Trainer) -> str | None:
    if trainer.lr_scale == 1:
        return None
    lr = trainer.recipe.train.lr
    return f"training diverged once and went on with a tenth of the step size; take a smaller train.lr (now {lr:g})"


@torch.no_grad()
def _collapsed(trainer: Trainer) -> str | None:
    """Tensors that training made constant."""
    names = [
        t.name
        for t in trainer.converted.tensors
        if t.parameter.numel() > 1
        and _constant(t.quantizer(t.parameter))
        and not t.float_is_constant
    ]
    if not names:
        return None
    return (
        f"every value of {_some(names)} is the same after quantization, so what follows learns nothing from it; give it more "
        f"bits by an override (min_bits), or take a smaller train.lr (now {trainer.recipe.train.lr:g})"
    )


def _constant(values: torch.Tensor) -> bool:
    return bool((values == values.flatten()[0]).all())


@torch.no_grad()
def _dead_levels(trainer: Trainer) -> str | None:
    """Tensors with many levels in force that no weight takes. With 8 bits the levels are the whole grid, so none is."""
    found = []
    for tensor in trainer.converted.tensors:
        bits = tensor.quantizer.bits
        if (
            tensor.kind == "bias"
            or max(bits) == 8
            or tensor.parameter.numel() < _ENOUGH * sum(2**s for s in bits)
        ):
            continue
        used, levels = _levels_used(tensor), sum(2**s for s in bits)
        if levels - used >= _MANY * levels:
            found.append(f"{tensor.name} ({levels - used} of {levels})")
    if not found:
        return None
    lr = trainer.recipe.train.levels_lr
    return (
        f"levels that no weight takes cost bytes for nothing in {_some(found)}; take a smaller train.levels_lr (now {lr:g}), "
        "or give these layers fewer bits by an override (max_bits)"
    )


def _levels_used(tensor: QuantizedParameter) -> int:
    """Different values that the quantized tensor holds, summed over its groups."""
    values = tensor.quantizer(tensor.parameter)
    groups = len(tensor.quantizer.bits)
    rows = (
        values.reshape(1, -1)
        if groups == 1
        else values.movedim(tensor.quantizer.axis, 0).reshape(groups, -1)
    )
    return sum(len(row.unique()) for row in rows)


def _idle_gates(trainer: Trainer, metrics: list[dict[str, Any]]) -> str | None:
    """Under the paper's rule: no gate moved before they froze, so the budget was met by force."""
    gates, recipe = trainer.gates, trainer.recipe
    before = [
        entry["bits"] for entry in metrics if "bits" in entry and entry["step"] <= gates.frozen_from
    ]
    if (
        recipe.gates.rule != "paper"
        or not gates.moving
        or not before
        or any(bits != before[0] for bits in before)
    ):
        return None
    if all(before[0][t.name] < t.max_bits for t in trainer.converted.tensors if not t.fixed):
        return None
    return (
        f"no gate moved in the {gates.frozen_from} steps before the gates froze, so the budget was met by closing gates at "
        f"once; raise gates.lr (now {recipe.gates.lr:g}), or take gates.rule=fisher, which needs no tuning"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
