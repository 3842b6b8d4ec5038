"""Fill a float network with the content of a file, so that it computes as trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ddqcli.artifact.tensors import BFLOAT16, ActivationTable
from ddqcli.errors import CheckpointError
from ddqcli.qat.frozen import INPUT, Array
from ddqcli.qat.input_hooks import (
    attach_input_quantizer,
    disable_nested_tensors,
    input_quantizer,
    remove_input_quantizer,
)
from ddqcli.qat.reparametrized import make_plain
from ddqcli.quant.frozen_input import FrozenInputQuantizer


def to_torch(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return a file's arrays as tensors of the same bits."""
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
    source: str,
) -> None:
    """Do as `ddqcli.load` with a file in memory; errors name it `source`.

    Raises CheckpointError for another network, and then leaves the model as it was.
    """
    # `ddq finetune` stores weights that the network computes (weight_norm) as plain ones.
    make_plain(model, lambda name: name in tensors)
    layers = {name.removesuffix(INPUT): table for name, table in tables.items()}
    if _check_fit(model, tensors, layers, source):
        model.float()  # as `ddq finetune` did
    model.load_state_dict(dict(tensors))
    for module in model.modules():
        if isinstance(input_quantizer(module), FrozenInputQuantizer):  # of an earlier file
            remove_input_quantizer(module)
    for layer, table in layers.items():
        quantizer = FrozenInputQuantizer(
            torch.from_numpy(table.levels.copy()), table.scale, table.zero_point
        )
        attach_input_quantizer(model.get_submodule(layer), quantizer)
    if layers:
        disable_nested_tensors(model)
    model.eval()


def _check_fit(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, ActivationTable],
    source: str,
) -> bool:
    """Raise CheckpointError for another network; True if it must be made float32 for the values."""
    state = model.state_dict()
    modules = dict(model.named_modules(remove_duplicate=False))
    common = [(name, tensors[name], value) for name, value in state.items() if name in tensors]
    rounded = {n: (stored, own) for n, stored, own in common if _rounds(stored, own.dtype)}
    float32_holds_all = not any(
        t.is_floating_point() and _rounds(t, torch.float32) for t in tensors.values()
    )
    must_widen = float32_holds_all and all(
        stored.is_floating_point() and own.is_floating_point() for stored, own in rounded.values()
    )
    unknown = [name for name in tensors if name not in state]
    unknown += [name + INPUT for name in layers if name not in modules]
    differences = {
        "it lacks": [name for name in state if name not in tensors],
        "it has unknown": unknown,
        "it has in another shape": [
            f"{name} {list(stored.shape)} instead of {list(own.shape)}"
            for name, stored, own in common
            if stored.shape != own.shape
        ],
        "it has in a type that this one would round": [
            f"{name} {stored.dtype}, not {own.dtype}"
            for name, (stored, own) in rounded.items()
            if not must_widen
        ],
    }
    faults = [
        f"{difference} {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for difference, names in differences.items()
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{source} is not of this {type(model).__name__}: {'; '.join(faults)}; "
            "build the network as it was built for `ddq finetune`."
        )
    return bool(rounded)


def _rounds(stored: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if `dtype` cannot hold all values of the stored tensor's type."""
    return torch.promote_types(stored.dtype, dtype) != dtype
