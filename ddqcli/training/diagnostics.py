"""Warnings of a finished run: rollback, constant layers, unused levels, idle gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddqcli.qat.model import QuantizedParameter
from ddqcli.training.trainer import Trainer

_UNUSED_SHARE = 0.25  # of a tensor's levels, from which on they are worth a warning
_VALUES_PER_LEVEL = 4  # a tensor with fewer cannot be expected to use every level


def find_warnings(trainer: Trainer, metrics: list[dict[str, Any]]) -> list[str]:
    """Return one sentence for each problem of the run, with its remedy.

    `metrics` are the run's lines of metrics.jsonl, as StepMetrics has them.
    """
    warnings = [
        _rollback(trainer),
        _constant_tensors(trainer),
        _unused_levels(trainer),
        _idle_gates(trainer, metrics),
    ]
    return [warning for warning in warnings if warning]


def _rollback(trainer: Trainer) -> str | None:
    if trainer.lr_scale == 1:
        return None
    return (
        "training diverged once and continued at a tenth of the learning rate; take a smaller "
        f"train.lr (now {trainer.recipe.train.lr:g})"
    )


@torch.no_grad()
def _constant_tensors(trainer: Trainer) -> str | None:
    """Name the tensors that training made constant."""
    names = [
        tensor.name
        for tensor in trainer.quantized.tensors
        if tensor.parameter.numel() > 1
        and _is_constant(tensor.quantizer(tensor.parameter))
        and not tensor.float_is_constant
    ]
    if not names:
        return None
    return (
        f"every value of {_join(names)} is the same after quantization, so later layers learn "
        "nothing from it; give it more bits by an override (min_bits), or take a smaller "
        f"train.lr (now {trainer.recipe.train.lr:g})"
    )


@torch.no_grad()
def _unused_levels(trainer: Trainer) -> str | None:
    """Name the tensors with many levels that no value takes.

    At 8 bits the levels are the grid itself and take no bytes.
    """
    names = []
    for tensor in trainer.quantized.tensors:
        bits = tensor.quantizer.bits
        levels = sum(2**s for s in bits)
        if (
            tensor.kind == "bias"
            or max(bits) == 8
            or tensor.parameter.numel() < _VALUES_PER_LEVEL * levels
        ):
            continue
        unused = levels - _used_levels(tensor)
        if unused >= _UNUSED_SHARE * levels:
            names.append(f"{tensor.name} ({unused} of {levels})")
    if not names:
        return None
    return (
        f"levels that no weight takes cost bytes for nothing in {_join(names)}; take a smaller "
        f"train.levels_lr (now {trainer.recipe.train.levels_lr:g}), or give these layers fewer "
        "bits by an override (max_bits)"
    )


def _idle_gates(trainer: Trainer, metrics: list[dict[str, Any]]) -> str | None:
    """Report that under the paper's rule no gate moved before the freeze."""
    gates, recipe = trainer.gates, trainer.recipe
    before_freeze = [
        line["bits"] for line in metrics if "bits" in line and line["step"] <= gates.frozen_from
    ]
    if recipe.gates.rule != "paper" or gates.budget.limit is None or not before_freeze:
        return None
    first = before_freeze[0]
    moved_before_first_report = all(
        first[t.name] < t.max_bits for t in trainer.quantized.tensors if not t.fixed
    )
    if moved_before_first_report or any(bits != first for bits in before_freeze):
        return None
    return (
        f"no gate moved in the {gates.frozen_from} steps before the gates froze, so the budget was "
        f"met by closing gates at once; raise gates.lr (now {recipe.gates.lr:g}), or take "
        "gates.rule=fisher, which needs no tuning"
    )


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.flatten()[0]).all())


def _used_levels(tensor: QuantizedParameter) -> int:
    """Count the distinct values of the quantized tensor, summed over its groups."""
    quantizer = tensor.quantizer
    values, groups = quantizer(tensor.parameter), len(quantizer.bits)
    rows = values if groups == 1 else values.movedim(quantizer.axis, 0)
    return sum(torch.unique(row).numel() for row in rows.reshape(groups, -1))


def _join(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
