"""A finished model as plain tensors."""

from __future__ import annotations

from typing import Any

import torch

from ddqcli.qat.model import QuantizedModel, QuantizedParameter


@torch.no_grad()
def freeze(converted: QuantizedModel) -> dict[str, Any]:
    """Everything the exported file needs, in plain tensors; beside it the trained values that it must reproduce, and the
    float `weights` behind them, for those who want to look.
    """
    return {
        "quantized": [_frozen(t) for t in converted.tensors],
        "trained": {
            t.name: t.quantizer(t.parameter).detach().cpu().contiguous() for t in converted.tensors
        },
        "activations": [{"name": name, **a.table()} for name, a in converted.activations.items()],
        "floats": {
            name: value.detach().cpu().contiguous()
            for name, value in converted.float_tensors().items()
        },
        "aliases": dict(converted.aliases),
        "weights": {t.name: t.parameter.detach().cpu().contiguous() for t in converted.tensors},
    }


def _frozen(tensor: QuantizedParameter) -> dict[str, Any]:
    levels, scale, zero_point = tensor.quantizer.effective_levels()
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "axis": tensor.quantizer.axis if len(tensor.quantizer.bits) > 1 else None,
        "indices": tensor.quantizer.indices(tensor.parameter).cpu().contiguous(),
        "levels": [level.to(torch.uint8).cpu() for level in levels],
        "scale": scale.cpu(),
        "zero_point": zero_point.to(torch.uint8).cpu(),
    }
