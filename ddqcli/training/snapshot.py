"""Snapshots of levels and quantization errors during a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddqcli.qat.model import QuantizedModel, QuantizedParameter

# One snapshot costs about as much as the quantizers do in one training step.
_SNAPSHOTS_PER_RUN = 40


@dataclass(frozen=True)
class Snapshot:
    """One line of metrics.jsonl. Its `levels` tell it from the lines of StepMetrics.

    Attributes:
        step: steps done.
        error: ||q - w||² / ||w||², by tensor.
        levels: the levels in force in units of the weights, ascending, by tensor. Only of tensors
            with one set of levels and at most 7 bits: at 8 bits the levels are the grid itself,
            and levels by channel are too many to draw.
    """

    step: int
    error: dict[str, float]
    levels: dict[str, list[float]]


def snapshot(quantized: QuantizedModel, step: int) -> Snapshot:
    """Return the current levels and errors. Changes nothing and draws no random numbers."""
    return Snapshot(
        step,
        {tensor.name: relative_error(tensor) for tensor in quantized.tensors},
        {
            tensor.name: _levels(tensor)
            for tensor in quantized.tensors
            if len(tensor.quantizer.bits) == 1 and tensor.quantizer.bits[0] < 8
        },
    )


def is_snapshot_step(step: int, steps: int, every: int) -> bool:
    """True at about 40 evenly spread multiples of `every` in a run of `steps`."""
    interval = max(1, steps // _SNAPSHOTS_PER_RUN)
    return step // interval > (step - every) // interval


@torch.no_grad()
def relative_error(tensor: QuantizedParameter) -> float:
    """Return ||q - w||² / ||w||² (||q||² if w is all zeros), to 6 significant digits."""
    x = tensor.parameter.detach().double()
    error = float((tensor.quantizer(tensor.parameter).double() - x).square().sum())
    return float(f"{error / (float(x.square().sum()) or 1.0):.6g}")


def _levels(tensor: QuantizedParameter) -> list[float]:
    (levels,), scale, zero_point = tensor.quantizer.effective_levels()
    return [float(f"{value:.6g}") for value in ((levels - zero_point) * scale).tolist()]
