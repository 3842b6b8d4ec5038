"""Bytes that an ONNX file takes beyond the indices and tables that a budget counts.

A budget in bytes of the ONNX file is one of quantized tensors, as any other, after this reserve. It
is an upper bound for every choice of bit-widths: the model is exported once with tensors of 64
values, which need the most nodes, and each tensor adds what it can take more than in a safetensors
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.data.trees import Tree, call
from ddqcli.errors import UsageError
from ddqcli.onnx.export import OnnxModel, make_onnx
from ddqcli.onnx.packed import CODES
from ddqcli.qat.budget import stored_bytes
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.load import fill, to_torch
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.qat.network_copy import copy_network

_MOST_BITS = CODES[-1].bits  # that are packed
_UNPACK_BYTES = 600  # at most, of the nodes that unpack one tensor
_TABLE_BYTES, _WIDE_TABLE_BYTES = 350, 600  # at most, of the nodes that make the digits of a code
_LEAST_PACKED = 450  # values; for fewer, packing never pays
_PARTS = ("packed", "packed_high", "values", "integers")


def onnx_reserve(
    quantized: QuantizedModel, float_model: nn.Module, example: Tree, about: Mapping[str, str]
) -> int:
    """Return the bytes of a target for an ONNX file that its quantized tensors cannot have.

    Args:
        quantized: the model, before its inputs' levels are fitted. It stays as it is.
        float_model: the network that it was made of.
        example: inputs of some samples, a tree of tensors [B, ...].
        about: the metadata of the file.

    Raises UsageError for what ONNX cannot express, or for levels by channel.
    """
    if any(len(t.quantizer.bits) > 1 for t in quantized.tensors):
        raise UsageError(
            "The size of an ONNX file with levels by channel is not known before training; set "
            "weights.granularity=layer, or leave out --target-format."
        )
    frozen = _with_many_values(_calibrated(quantized, example))
    model = _filled(float_model, frozen)
    exported = make_onnx(model, frozen.weights(), example, about)
    payload = _payload(exported, frozen.weights())
    reserve = len(exported.raw) - sum(map(sum, payload.values()))
    for tensor in quantized.tensors:
        reserve += _most_beyond(tensor, *payload.get(tensor.name, (0, 0)))
    return reserve + _tables(quantized.tensors)


def _calibrated(quantized: QuantizedModel, example: Tree) -> FrozenModel:
    """Return a copy of the model whose inputs' levels fit the example."""
    trial = QuantizedModel.of(copy_network(quantized.model).cpu().eval())
    for quantizer in trial.activations.values():
        quantizer.observing = True
    with torch.no_grad():
        call(trial.model, example)
    for name, quantizer in [*trial.activations.items()]:
        if not quantizer.fit():
            trial.keep_input_float(name)
    return FrozenModel.from_state(freeze(trial))


def _with_many_values(frozen: FrozenModel) -> FrozenModel:
    """Give each weight as many different values as are packed; no two weights are equal."""
    random = np.random.default_rng(0)
    count = 1 << _MOST_BITS
    levels = np.arange(0, 256, 256 // count, dtype=np.uint8)

    def made(tensor: QuantizedTensor) -> QuantizedTensor:
        indices = random.integers(0, count, tensor.indices.size).astype(np.uint8)
        return replace(tensor, indices=indices, levels=(levels,))

    return replace(frozen, quantized=[made(tensor) for tensor in frozen.quantized])


def _filled(float_model: nn.Module, frozen: FrozenModel) -> nn.Module:
    tables = {table.name: table for table in frozen.activations}
    tensors = {name: value for name, value in frozen.expected().items() if name not in tables}
    model = copy_network(float_model).cpu()
    fill(model, to_torch(tensors), tables, "the model")
    return model


def _payload(
    exported: OnnxModel, weights: Mapping[str, QuantizedTensor]
) -> dict[str, tuple[int, int]]:
    """Return the bytes of each weight's indices and values in the file: (packed, not packed)."""
    owner = {f"{name}.{part}": tensor.name for name, tensor in weights.items() for part in _PARTS}
    payload: dict[str, tuple[int, int]] = {}
    for stored in exported.proto.graph.initializer:
        if (name := owner.get(stored.name)) is not None:
            packed, plain = payload.get(name, (0, 0))
            nbytes = len(stored.raw_data)
            is_plain = stored.name.endswith(".integers")
            payload[name] = (packed, plain + nbytes) if is_plain else (packed + nbytes, plain)
    return payload


def _most_beyond(tensor: QuantizedParameter, packed: int, plain: int) -> int:
    """Return the most bytes that a tensor takes in the file beyond those of a safetensors file."""
    if not packed and not plain:
        return 0  # in float, or not at all
    count = 1 << _MOST_BITS
    numel = plain or (packed - count) * 8 // _MOST_BITS
    # Channels that pad a convolution are zeros, which may be a value more.
    more_bits = int(numel - tensor.parameter.numel() > 8)

    def most(bits: int) -> int:
        bits += more_bits
        if bits > _MOST_BITS:
            return numel
        nbytes = -(-numel * bits // 8) + (1 << bits) + 8
        return nbytes if packed else min(numel, nbytes + _UNPACK_BYTES) + _UNPACK_BYTES // 4

    return max(most(bits) - stored_bytes(tensor, bits) for bits in tensor.offered)


def _tables(tensors: Sequence[QuantizedParameter]) -> int:
    """Return the most bytes of the tables of digits that the export has not."""
    offered = {bits + more for t in tensors for bits in t.offered for more in (0, 1)}
    costs = [
        _WIDE_TABLE_BYTES if code.high_bits else _TABLE_BYTES
        for code in CODES
        if code.bits in offered and code.bits < _MOST_BITS
    ]
    packed = [t for t in tensors if t.parameter.numel() > _LEAST_PACKED]
    return sum(sorted(costs)[::-1][: len(packed)])
