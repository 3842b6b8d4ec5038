"""A float network quantized without training, and its file: for tests of what reads files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.data.trees import Tree, call
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.norms import fold_norms
from ddqcli.recipe.schema import Recipe


@dataclass(frozen=True)
class Quantized:
    """The network with its quantizers, and the file that holds it."""

    model: nn.Module
    path: Path
    weights: dict[str, QuantizedTensor]  # under all of their names


def quantize(
    model: nn.Module,
    x: Tree,
    path: Path,
    *,
    bits: int = 4,
    act_bits: int | None = 8,
    overrides: Sequence[dict[str, Any]] = (),
    **weights: Any,
) -> Quantized:
    """Quantize a copy of `model`, its input quantizers fitted to x, and write the file.

    `weights`: fields of the recipe's section of that name.
    """
    sections = {"weights": {"max_bits": bits, **weights}, "activations": {"bits": act_bits}}
    recipe = Recipe.model_validate({**sections, "overrides": list(overrides)})
    quantized = convert(_folded(copy.deepcopy(model).eval()), recipe)
    for quantizer in quantized.activations.values():
        quantizer.observing = True
    with torch.no_grad():
        call(quantized.model, x)
    for quantizer in quantized.activations.values():
        quantizer.fit()
    frozen = FrozenModel.from_state(freeze(quantized))
    raw, _ = encode_artifact(
        frozen.quantized,
        frozen.activations,
        frozen.floats,
        frozen.aliases,
        {},
        frozen.constants,
    )
    path.write_bytes(raw)
    return Quantized(quantized.model, path, frozen.weights())


def _folded(model: nn.Module) -> nn.Module:
    """Give BatchNorm the values that the file holds, as a delivered network has them."""
    state = model.state_dict()
    norms = fold_norms(model, state)
    for name, value in (norms.vectors | norms.constants).items():
        state[name].copy_(value)
    return model


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm the uneven statistics and factors of a trained network; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.running_mean, -0.3, 0.3),
                (norm.running_var, 0.5, 2.0),
                (norm.bias, -0.3, 0.3),
            ):
                tensor.data.copy_(
                    torch.rand(tensor.shape, generator=generator) * (high - low) + low
                )
            norm.weight.data.copy_(torch.randn(norm.weight.shape, generator=generator) * 0.4 + 1)
    return model.eval()
