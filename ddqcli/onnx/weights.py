"""Weights (integers - zero_point) * scale as nodes: for integer kernels, or folded to floats."""

from __future__ import annotations

import numpy as np

from ddqcli.onnx.graph import Array, Graph
from ddqcli.onnx.kernel import Kernel
from ddqcli.onnx.packed import add_integers


def add_dequantized(
    graph: Graph, name: str, value: str, kernel: Kernel, axis: int
) -> tuple[str, str]:
    """Add the weight of an integer kernel: `value`, its integers, with the channels along `axis`.

    onnxruntime runs DequantizeLinear and the product after it as one integer kernel.

    Returns:
        The weight's value and its scale's.
    """
    scale = graph.add_constant(f"{name}.scale", kernel.scale)
    zero_point = _add_zero_point(graph, f"{name}.zero_point", kernel.zero_point)
    inputs = [value, scale, zero_point]
    return graph.add_node("DequantizeLinear", inputs, f"{name}.value", axis=axis), scale


def add_shift(graph: Graph, name: str, shift: Array, scale: str, input_scale: str) -> str:
    """Add the shift [K] of an integer kernel, in units of `scale` [K] times `input_scale`."""
    unit = graph.add_node("Mul", [scale, input_scale], f"{name}.unit")
    stored = graph.add_constant(f"{name}.shift", shift)
    return graph.add_node("DequantizeLinear", [stored, unit], f"{name}.shift_value", axis=0)


def add_floats(
    graph: Graph, name: str, integers: Array, scale: Array, zero_point: Array, axis: int | None
) -> str:
    """Add a weight in float: with nodes that onnxruntime folds when it loads the file.

    It would run a DequantizeLinear at every call.
    """
    along = [1] * integers.ndim
    if axis is not None:
        along[axis] = -1
    value = add_integers(graph, name, integers, axis, floats=True)
    if zero_point.any():
        offset = zero_point.astype(np.float32).reshape(along)
        stored = graph.add_constant(f"{name}.zero_point", offset)
        value = graph.add_node("Sub", [value, stored], f"{name}.centered")
    factor = graph.add_constant(f"{name}.scale", scale.reshape(along))
    return graph.add_node("Mul", [value, factor], f"{name}.value")


def _add_zero_point(graph: Graph, name: str, zero_point: Array) -> str:
    """Add a zero point a channel; QGemm cannot do without. Equal ones take a few bytes."""
    is_one = np.all(zero_point == zero_point[:1])
    return graph.filled(zero_point) if is_one else graph.add_constant(name, zero_point)
