"""The one schema of a finished model, of which `final.pt` and the exported file are made.

`freeze` writes the schema and needs torch. `FrozenModel` reads it and needs numpy alone. Its keys:

    quantized    [{name, shape, axis (None: one group), indices, levels, scale, zero_point}]
    activations  [{name of the layer, levels, scale, zero_point}]
    floats       {name: tensor that stays float, of any dtype; BatchNorm's are folded (qat.norms)}
    constants    {name: tensor of equal elements: what folding leaves of BatchNorm's statistics}
    aliases      {further name of a shared tensor: name under which it is stored}
    trained      {name: float32 values of a quantized tensor, as the exported file must give}
    weights      {name: float weights behind them, to inspect or to start another run from}
    unfolded     {name: tensor of a BatchNorm before it was folded, to start another run from}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor
from ddqcli.errors import DDQError

if TYPE_CHECKING:
    import torch

    from ddqcli.qat.model import QuantizedModel, QuantizedParameter

Array = NDArray[Any]
ToArray = Callable[[Any], Array]  # of a torch.Tensor, or of a tensor's location in a file

INPUT = " (input)"  # suffix of a layer's name for the levels of its input


@dataclass(frozen=True)
class FrozenModel:
    """A finished model as numpy arrays. Raises TypeError or ValueError if names do not fit."""

    quantized: list[QuantizedTensor]
    activations: list[ActivationTable]  # named after their layer, with the suffix INPUT
    floats: dict[str, Array]
    aliases: dict[str, str]
    trained: dict[str, Array]
    constants: dict[str, Array]

    def __post_init__(self) -> None:
        quantized = [tensor.name for tensor in self.quantized]
        stored = [*quantized, *self.floats, *self.constants]
        tables = [table.name for table in self.activations]
        for name in (*stored, *tables, *self.trained, *self.aliases, *self.aliases.values()):
            if not isinstance(name, str):
                raise TypeError(f"{name!r} is no name")
        if len({*stored, *tables}) < len(stored) + len(tables):
            raise ValueError("a name is given twice")
        if not ({*self.trained} <= {*quantized} and {*self.aliases.values()} <= {*stored}):
            raise ValueError("a name has no tensor")

    @classmethod
    def from_state(cls, state: Mapping[str, Any], to_array: ToArray | None = None) -> FrozenModel:
        """Parse what `freeze` returned.

        Args:
            state: the schema, as torch.load or ddqcli.checkpoint.torch_zip.contents reads it.
            to_array: reads one tensor of it; by default `tensor_to_array`.

        Raises DDQError for a dtype that no file can hold, and AttributeError, LookupError,
        TypeError or ValueError for a damaged state.
        """
        read = to_array or tensor_to_array
        return cls(
            quantized=[quantized_tensor(entry, read) for entry in state["quantized"]],
            activations=[activation_table(entry, read) for entry in state["activations"]],
            floats={name: read(value) for name, value in state["floats"].items()},
            aliases=dict(state["aliases"]),
            trained={name: read(value) for name, value in state["trained"].items()},
            # Runs of older versions have none.
            constants={name: read(value) for name, value in state.get("constants", {}).items()},
        )

    def weights(self) -> dict[str, QuantizedTensor]:
        """The quantized tensors under all of their names."""
        stored = {tensor.name: tensor for tensor in self.quantized}
        shared = {alias: stored[name] for alias, name in self.aliases.items() if name in stored}
        return stored | shared

    def expected(self) -> dict[str, Array]:
        """Return every array that a reader of the exported file must get, by name."""
        tensors = self.trained | self.floats | self.constants
        tensors |= {alias: tensors[name] for alias, name in self.aliases.items()}
        return tensors | {table.name: table.values() for table in self.activations}


def quantized_tensor(entry: Mapping[str, Any], to_array: ToArray) -> QuantizedTensor:
    """Parse one entry of the state's `quantized`."""
    return QuantizedTensor(
        name=entry["name"],
        shape=tuple(entry["shape"]),
        axis=entry["axis"],
        indices=to_array(entry["indices"]).reshape(-1),
        levels=tuple(to_array(levels) for levels in entry["levels"]),
        scale=to_array(entry["scale"]),
        zero_point=to_array(entry["zero_point"]),
    )


def activation_table(entry: Mapping[str, Any], to_array: ToArray) -> ActivationTable:
    """Parse one entry of the state's `activations`."""
    return ActivationTable(
        name=entry["name"] + INPUT,
        levels=to_array(entry["levels"]),
        scale=entry["scale"],
        zero_point=entry["zero_point"],
    )


def tensor_to_array(tensor: torch.Tensor) -> Array:
    """Return a CPU tensor as an array of the same bits.

    Raises DDQError for a dtype that no file can hold.
    """
    import torch

    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return np.asarray(tensor.view(torch.uint16).numpy()).view(decoder.BFLOAT16)
    try:
        return np.asarray(tensor.numpy())
    except TypeError as error:
        raise DDQError(
            f"A tensor of {tensor.dtype} cannot be stored; keep it out of the model's state dict."
        ) from error


def freeze(model: QuantizedModel) -> dict[str, Any]:
    """Return the state of a finished model: the schema above, with CPU tensors. Changes nothing."""
    import torch

    with torch.no_grad():
        floats, norms = model.float_tensors(), model.folded_norms()
        unfolded = {name: floats[name] for name in norms.vectors | norms.constants}
        stored = {k: v for k, v in (floats | norms.vectors).items() if k not in norms.constants}
        return {
            "quantized": [_quantized_entry(tensor) for tensor in model.tensors],
            "trained": {t.name: _stored(t.quantizer(t.parameter)) for t in model.tensors},
            "activations": [
                {"name": name, **quantizer.table()} for name, quantizer in model.activations.items()
            ],
            "floats": {name: _stored(value) for name, value in stored.items()},
            "constants": {name: _stored(value) for name, value in norms.constants.items()},
            "aliases": dict(model.aliases),
            "weights": {t.name: _stored(t.parameter) for t in model.tensors},
            "unfolded": {name: _copied(value) for name, value in unfolded.items()},
        }


def _quantized_entry(tensor: QuantizedParameter) -> dict[str, Any]:
    import torch

    quantizer = tensor.quantizer
    levels, scale, zero_point = quantizer.effective_levels()
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "axis": quantizer.axis if len(quantizer.bits) > 1 else None,
        "indices": _stored(quantizer.indices(tensor.parameter)),
        "levels": [level.to(torch.uint8).cpu() for level in levels],
        "scale": scale.cpu(),
        "zero_point": zero_point.to(torch.uint8).cpu(),
    }


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
