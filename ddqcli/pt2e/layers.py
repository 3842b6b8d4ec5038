"""Layers of the graph in integers: quantized weights, and BatchNorm folded into their scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.onnx.kernel import Kernel
from ddqcli.pt2e.grids import DEQUANTIZE, LAYERS, aten, decomposed
from ddqcli.pt2e.integers import LARGEST, Symmetric

Array = NDArray[Any]

_NORM = aten._native_batch_norm_legit_no_training.default


class Layer(NamedTuple):
    """The weights of a layer, int8."""

    name: str  # of the tensor
    value: Symmetric


def with_integers(
    module: fx.GraphModule, weights: Mapping[str, QuantizedTensor]
) -> dict[fx.Node, Layer]:
    """Put quantized weights and folded BatchNorm into the layers that read quantized inputs."""
    found: dict[fx.Node, Layer] = {}
    for node in list(module.graph.nodes):
        if node.target not in LAYERS or node.args[0].target is not DEQUANTIZE:
            continue
        source, bias = (*node.args[1:3], None)[:2]
        tensor = weights.get(source.target) if source.op == "get_attr" else None
        if tensor is None or tensor.axis not in (None, 0):
            continue
        if bias is not None and bias.op != "get_attr":  # computed from other values
            continue
        kernel = Kernel.of(tensor, _array(module, bias))
        kernel = _fold_norm(module, node, kernel)
        value = Symmetric.of(kernel, node.args[0].args[1])
        _set_weights(module, node, value, len(found))
        found[node] = Layer(tensor.name, value)
    return found


def _array(module: fx.GraphModule, node: fx.Node | None) -> Array | None:
    """Return a constant of the graph; None if the value is computed."""
    if node is None or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value: Array = getattr(module.get_submodule(owner), name).detach().numpy()
    return value


def _fold_norm(module: fx.GraphModule, layer: fx.Node, kernel: Kernel) -> Kernel:
    """Fold a BatchNorm that alone reads the layer, and take it out of the graph."""
    if len(layer.users) != 1 or (norm := next(iter(layer.users))).target is not _NORM:
        return kernel
    arguments: Any = norm.args
    weight, bias, mean, variance = (_array(module, value) for value in arguments[1:5])
    if weight is None or bias is None or mean is None or variance is None:
        return kernel
    for item in list(norm.users):
        item.replace_all_uses_with(layer)
        module.graph.erase_node(item)
    module.graph.erase_node(norm)
    return kernel.folded(weight, bias, mean, variance, arguments[6])


def _set_weights(module: fx.GraphModule, layer: fx.Node, value: Symmetric, number: int) -> None:
    """Give the layer dequantized weights, as the quantizer's input too, and a float bias.

    Runtimes quantize the bias to int32.
    """
    graph, shape = module.graph, [-1] + [1] * (value.integers.ndim - 1)
    weight = value.integers.astype(np.float32) * value.scale.reshape(shape)
    names = [f"{part}_{number}" for part in ("weight", "scale", "zero_point", "bias")]
    zeros = np.zeros(len(value.scale), np.int64)
    for name, array in zip(names, (weight, value.scale, zeros, value.shift), strict=True):
        module.register_buffer(name, torch.from_numpy(np.array(array)))
    with graph.inserting_before(layer):
        float_weight, scale, zero_point, bias = (graph.get_attr(name) for name in names)
        arguments = (scale, zero_point, 0, -LARGEST, LARGEST, torch.int8)
        code = graph.call_function(
            decomposed.quantize_per_channel.default, (float_weight, *arguments)
        )
        weights = graph.call_function(decomposed.dequantize_per_channel.default, (code, *arguments))
    layer.args = (layer.args[0], weights, bias, *layer.args[3:])
