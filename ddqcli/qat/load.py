"""`ddqcli.load`: an exported file into a float network, which then computes what the trained one did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddqcli.artifact.read import decode_model
from ddqcli.artifact.tensors import BFLOAT16, ActivationTable
from ddqcli.errors import CheckpointError
from ddqcli.qat.frozen import INPUT
from ddqcli.qat.input_hooks import attach_input_quantizer, disable_nested_tensors
from ddqcli.quant.frozen_input import FrozenInputQuantizer


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill `model`, the float architecture, with what an exported file holds; return it in eval mode.

    Its weights become the trained values bit for bit, and the layers whose inputs were quantized quantize them. The file
    must be of this architecture, name for name. For inference: gradients do not pass the inputs' quantizers.

    Raises UsageError for no ddq file, VerificationError for a damaged one, CheckpointError if it is of another network.

    >>> model = ddqcli.load("model.safetensors", torchvision.models.resnet18())  # doctest: +SKIP
    """
    tensors, tables = decode_model(Path(path))
    fill(model, to_torch(tensors), tables, str(path))
    return model


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Arrays of a file as tensors of the same bits."""
    return {
        name: torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if array.dtype == BFLOAT16
        else torch.from_numpy(array)
        for name, array in arrays.items()
    }


def fill(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    tables: Mapping[str, ActivationTable],
    what: str,
) -> None:
    """`load` from memory; `what` names the source in errors. Raises CheckpointError, and then leaves the model as it was."""
    layers = {name.removesuffix(INPUT): table for name, table in tables.items()}
    _check_fit(model, tensors, layers, what)
    model.load_state_dict(dict(tensors))
    for module in model.modules():
        if isinstance(
            getattr(module, "input_quantizer", None), FrozenInputQuantizer
        ):  # of an earlier file
            module.input_quantizer = None
    for layer, table in layers.items():
        quantizer = FrozenInputQuantizer(
            torch.from_numpy(table.levels.copy()), table.scale, table.zero_point
        )
        attach_input_quantizer(model.get_submodule(layer), quantizer)
    if layers:
        disable_nested_tensors(model)
    model.eval()


def _check_fit(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Any], what: str
) -> None:
    wanted = model.state_dict()
    both = [(name, tensors[name], value) for name, value in wanted.items() if name in tensors]
    modules = dict(model.named_modules(remove_duplicate=False))
    faults = {
        "it lacks": [name for name in wanted if name not in tensors],
        "it has unknown": [name for name in tensors if name not in wanted]
        + [name + INPUT for name in layers if name not in modules],
        "it has in another shape": [
            f"{name} {list(have.shape)} instead of {list(want.shape)}"
            for name, have, want in both
            if have.shape != want.shape
        ],
        "it has in a type that this one would round": [
            f"{name} {have.dtype}, not {want.dtype}"
            for name, have, want in both
            if torch.promote_types(have.dtype, want.dtype) != want.dtype
        ],
    }
    said = [
        f"{words} {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for words, names in faults.items()
        if names
    ]
    if said:
        raise CheckpointError(
            f"{what} is not of this {type(model).__name__}: {'; '.join(said)}; "
            "build the network as it was built for `ddq finetune`."
        )
