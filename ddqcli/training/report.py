"""The report of a finished model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddqcli.qat.budget import ResolvedBudget, activation_bytes, average_bits, stored_bytes
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.training.snapshot import relative_error

REPORT_VERSION = 1


@torch.no_grad()
def build_report(
    converted: QuantizedModel,
    budget: ResolvedBudget,
    *,
    accuracy: tuple[float, float] | None,
    source: dict[str, str],
    run: dict[str, Any],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The report's `data`. `accuracy` is (float, quantized) in percent; None if nothing was evaluated."""
    quantized = sum(stored_bytes(t) for t in converted.tensors)
    limit = budget.file_limit
    return {
        "version": REPORT_VERSION,
        "layers": [_row(t) for t in converted.tensors],
        "totals": {
            "bytes": quantized + budget.overhead_bytes,
            "float_bytes": budget.float_bytes,
            "budget_bytes": limit,
            "average_bits": average_bits(converted),
            "quantized_bytes": quantized,
            "kept_bytes": budget.overhead_bytes,
            "weights": budget.weights,
        },
        "accuracy": _accuracy(*accuracy) if accuracy else None,
        "activations": [
            {
                "name": name,
                "bits": a.bits,
                "levels": "learned" if a.learned else "uniform",
                "bytes": activation_bytes(a.bits),
            }
            for name, a in converted.activations.items()
        ],
        "kept_float": dict(converted.kept_float),
        "source": source,
        "run": run,
        "warnings": list(warnings),
    }


def _accuracy(before: float, after: float) -> dict[str, float]:
    return {
        "float": round(before, 4),
        "quantized": round(after, 4),
        "drop": round(before - after, 4),
    }


def _row(tensor: QuantizedParameter) -> dict[str, Any]:
    bits = tensor.quantizer.bits
    levels, _, _ = tensor.quantizer.effective_levels()
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "shape": list(tensor.shape),
        "bits": bits[0] if len(set(bits)) == 1 else round(sum(bits) / len(bits), 4),
        "levels": max(len(level.unique()) for level in levels),
        "bytes": stored_bytes(tensor),
        "float_bytes": tensor.parameter.numel() * tensor.parameter.element_size(),
        "error": relative_error(tensor),
    }
