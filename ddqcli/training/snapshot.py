"""Levels and quantization errors at moments of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddqcli.qat.model import QuantizedModel, QuantizedParameter

_MOMENTS = (
    40  # snapshots a run, about; one costs about as much as the quantizers do in a training step
)


@dataclass(frozen=True)
class Snapshot:
    """A line of metrics.jsonl of its own kind: the others have no `levels`."""

    step: int  # steps done
    error: dict[str, float]  # ||q - w||² / ||w||², by tensor
    levels: dict[
        str, list[float]
    ]  # level values in force, ascending; of tensors with one set of them and up to 7 bits


def snapshot(converted: QuantizedModel, step: int) -> Snapshot:
    """The tensors as they are now. Changes nothing, and takes no random numbers.

    At 8 bits the levels are the grid itself and have nothing to show; levels by channel are too many to be drawn.
    """
    return Snapshot(
        step,
        {tensor.name: relative_error(tensor) for tensor in converted.tensors},
        {
            t.name: _levels(t)
            for t in converted.tensors
            if len(t.quantizer.bits) == 1 and t.quantizer.bits[0] < 8
        },
    )


def is_snapshot_step(step: int, steps: int, every: int) -> bool:
    """Whether to take a snapshot at `step` of a run of `steps` that reports `every` so many steps."""
    span = max(1, steps // _MOMENTS)
    return step // span > (step - every) // span


@torch.no_grad()
def relative_error(tensor: QuantizedParameter) -> float:
    """Sum of squared differences between quantized and float values over the sum of squares (1 if all are 0), to 6 digits."""
    x = tensor.parameter.detach().double()
    error = float((tensor.quantizer(tensor.parameter).double() - x).square().sum())
    return float(f"{error / (float(x.square().sum()) or 1.0):.6g}")


def _levels(tensor: QuantizedParameter) -> list[float]:
    (levels,), scale, zero_point = tensor.quantizer.effective_levels()
    return [float(f"{value:.6g}") for value in ((levels - zero_point) * scale).tolist()]
