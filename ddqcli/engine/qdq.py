"""An ONNX graph of torch's exporter with float weights -> the same graph in whole numbers; needs onnx, not torch.

A weight is (k - zero_point) * scale with k in 0..255: exactly the int8 tensor k - 128. BatchNorm after a convolution is one
factor and one shift a channel: the factor goes into the scale, so the whole numbers stay what was trained. Where all of

    u8 -> DequantizeLinear -> Conv <- DequantizeLinear <- int8;  Conv -> BatchNormalization -> Relu -> QuantizeLinear

is there, onnxruntime runs it as one QLinearConv. A convolution whose result stays float (before a residual addition) has no
fast kernel there; as a MatMul over its windows it has one, whose sums are exact and whose scale and shift are float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ddqcli.artifact.tensors import QuantizedTensor

Array = np.ndarray[Any, Any]
_FEWEST_CHANNELS = 16  # below it, gathering windows costs more than whole numbers save
_LARGEST_BIAS = 2**30


def rewrite(model: Any, weights: Mapping[str, QuantizedTensor]) -> Any:
    """The onnx.ModelProto with `weights` in the place of the float initializers of these names."""
    return _Rewriter(model, weights).run()


@dataclass
class _Kernel:
    """A convolution's weights as whole numbers, with one scale and shift for each output channel."""

    integers: Array  # int8 [K, C/groups, ...]
    scale: Array  # float32 [K]
    zero_point: Array  # int8 [K]
    shift: Array  # float32 [K]


class _Rewriter:
    """One pass over the nodes in order: each is kept, or replaced by others that end in the same names."""

    def __init__(self, model: Any, weights: Mapping[str, QuantizedTensor]) -> None:
        self.model, self.graph, self.weights = model, model.graph, weights
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in set(node.input):
                self.users.setdefault(name, []).append(node)
        self.results = {output.name for output in self.graph.output}
        self.shapes = {v.name: _shape(v) for v in (*self.graph.value_info, *self.graph.input, *self.graph.output)}
        self.nodes: list[Any] = []
        self.absorbed: set[str] = set()  # outputs of nodes that another one now does the work of
        self.clipped: dict[str, tuple[int, int]] = {}  # output of a QuantizeLinear -> range that it is to be held in
        self.names: Counter[str] = Counter()

    def run(self) -> Any:
        for node in list(self.graph.node):
            if node.output[0] not in self.absorbed:
                self._replace(node)
        self._drop_unused()
        return self.model

    def _replace(self, node: Any) -> None:
        if node.op_type == "Conv" and node.input[1] in self.weights:
            self._conv(node)
        elif node.op_type in ("Gemm", "MatMul") and (name := self._linear_weight(node)):
            self._linear(node, name)
        elif node.output[0] in self.clipped:
            self._clipped_quantize(node)
        else:
            for at, name in enumerate(node.input):
                if name in self.weights:
                    node.input[at] = self._dequantized(name)
            self.nodes.append(node)

    # ---- convolutions

    def _conv(self, conv: Any) -> None:
        x, name = conv.input[0], conv.input[1]
        bias = self._value(conv.input[2]) if len(conv.input) > 2 else None
        kernel, end = self._folded(conv, _kernel(self.weights[name], bias))
        whole = self._quantize_before(x)
        after = self._quantize_after(end) if whole else None
        if after and (rounded := self._rounded_bias(kernel, whole)) is not None:
            activation, quantize = after
            if activation is not None:
                self._move_clip(activation, quantize)
            bias_scale = kernel.scale * self._value(whole.input[1])
            shift = self._dequantize(f"{name}.shift", rounded, bias_scale, np.zeros_like(rounded), 0)
            self._emit_conv(conv, name, kernel, shift, quantize.input[0])
        elif whole and self._as_windows(conv, kernel):
            self._emit_windows(conv, name, kernel, whole, end)
        else:
            self._emit_conv(conv, name, kernel, self._constant(f"{name}.shift", kernel.shift), end)

    def _folded(self, conv: Any, kernel: _Kernel) -> tuple[_Kernel, str]:
        """The kernel with the BatchNorm that follows, if one does and nothing else sees what lies between; its output."""
        norm = self._only_user(conv.output[0])
        if norm is None or norm.op_type != "BatchNormalization":
            return kernel, conv.output[0]
        weight, bias, mean, variance = (self._value(name) for name in norm.input[1:5])
        if any(value is None for value in (weight, bias, mean, variance)):
            return kernel, conv.output[0]
        self.absorbed.add(norm.output[0])
        factor = weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _attributes(norm)["epsilon"])
        shift = (kernel.shift - mean.astype(np.float64)) * factor + bias
        scale = (kernel.scale * factor).astype(np.float32)
        return _Kernel(kernel.integers, scale, kernel.zero_point, shift.astype(np.float32)), norm.output[0]

    def _quantize_before(self, name: str) -> Any:
        """The DequantizeLinear that makes this value, if one does."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _quantize_after(self, name: str) -> tuple[Any, Any] | None:
        """What alone takes this value: (Relu or Clip or None, QuantizeLinear)."""
        node = self._only_user(name)
        activation = node if node is not None and node.op_type in ("Relu", "Clip") else None
        if activation is not None:
            node = self._only_user(activation.output[0])
        return (activation, node) if node is not None and node.op_type == "QuantizeLinear" else None

    def _rounded_bias(self, kernel: _Kernel, whole: Any) -> Array | None:
        """The shift in units of the sums, as QLinearConv wants it: int32 [K]; None where it cannot be had."""
        with np.errstate(divide="ignore", invalid="ignore"):
            rounded = np.rint(kernel.shift / (kernel.scale.astype(np.float64) * self._value(whole.input[1])))
        rounded[(kernel.scale == 0) & (kernel.shift == 0)] = 0
        alike = len(set(kernel.zero_point.tolist())) == 1  # which QLinearConv demands
        return rounded.astype(np.int32) if alike and bool(np.all(np.abs(rounded) < _LARGEST_BIAS)) else None

    def _move_clip(self, activation: Any, quantize: Any) -> None:
        """Let the quantizer saturate in place of the activation: rounding keeps order, so clipping may come after it."""
        self.absorbed.add(activation.output[0])
        scale, zero_point = (self._value(name) for name in quantize.input[1:3])
        low, high = 0.0, np.inf
        if activation.op_type == "Clip":
            bounds = [self._value(name) if name else None for name in activation.input[1:3]]
            low, high = (default if b is None else float(b) for b, default in zip(bounds, (-np.inf, high), strict=True))
        with np.errstate(over="ignore"):
            ends = [np.clip(np.rint(np.float32(end) / scale) + zero_point, 0, 255) for end in (low, high)]
        if ends != [0, 255]:
            self.clipped[quantize.output[0]] = (int(ends[0]), int(ends[1]))
        quantize.input[0] = activation.input[0]

    def _clipped_quantize(self, quantize: Any) -> None:
        low, high = self.clipped[quantize.output[0]]
        out = quantize.output[0]
        quantize.output[0] = self._new(f"{out}.wide")
        self.nodes.append(quantize)
        bounds = [self._constant(f"{out}.{end}", np.array(v, np.uint8)) for end, v in (("low", low), ("high", high))]
        self._node("Clip", [quantize.output[0], *bounds], out)

    def _emit_conv(self, conv: Any, name: str, kernel: _Kernel, shift: str, end: str) -> None:
        weight = self._dequantize(name, kernel.integers, kernel.scale, kernel.zero_point, 0)
        del conv.input[1:]
        conv.input.extend([weight, shift])
        conv.output[0] = end
        self.nodes.append(conv)

    # ---- windows: a convolution as a MatMul

    def _as_windows(self, conv: Any, kernel: _Kernel) -> bool:
        sizes = self.shapes.get(conv.output[0])
        known = sizes is not None and len(sizes) == 4 and all(isinstance(size, int) for size in sizes[1:])
        a = _attributes(conv)
        plain = a.get("group", 1) == 1 and a.get("auto_pad", b"NOTSET") == b"NOTSET"
        return known and plain and kernel.integers.shape[1] >= _FEWEST_CHANNELS

    def _emit_windows(self, conv: Any, name: str, kernel: _Kernel, whole: Any, end: str) -> None:
        """uint8 [B,C,H,W] -> windows [B,H',W',kh*kw*C] -> MatMul -> [B,H',W',K] -> [B,K,H',W']."""
        a, out = _attributes(conv), conv.output[0]
        top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
        current = self._node("Transpose", [whole.input[0]], self._new(f"{out}.nhwc"), perm=[0, 2, 3, 1])
        if any((top, left, bottom, right)):
            pads = self._constant(f"{out}.pads", np.array([0, top, left, 0, 0, bottom, right, 0], np.int64))
            current = self._node("Pad", [current, pads, whole.input[2]], self._new(f"{out}.padded"))
        _, _, height, width = self.shapes[out]
        for axis, size in ((2, width), (1, height)):
            taps, stride, dilation = (_along(a, key, axis) for key in ("kernel_shape", "strides", "dilations"))
            current = self._shifted(current, out, axis, size, taps, stride, dilation)
        inner = self._node("DequantizeLinear", [current, *whole.input[1:3]], self._new(f"{out}.windows"))
        matrix = kernel.integers.transpose(2, 3, 1, 0).reshape(-1, len(kernel.scale))
        weight = self._dequantize(name, matrix, kernel.scale, kernel.zero_point, 1)
        product = self._node("MatMul", [inner, weight], self._new(f"{out}.product"))
        shift = self._constant(f"{name}.shift", kernel.shift)
        moved = self._node("Add", [product, shift], self._new(f"{out}.shifted"))
        self._node("Transpose", [moved], end, perm=[0, 3, 1, 2])

    def _shifted(self, x: str, out: str, axis: int, size: int, taps: int, stride: int, dilation: int) -> str:
        """x beside itself, once for each tap of the kernel along `axis`, on the channels' axis."""
        if taps == 1 and stride == 1:
            return x
        pieces = []
        for tap in range(taps):
            ends = (tap * dilation, tap * dilation + (size - 1) * stride + 1, axis, stride)
            slices = [self._constant(f"slice.{value}", np.array([value], np.int64), shared=True) for value in ends]
            pieces.append(self._node("Slice", [x, *slices], self._new(f"{out}.tap")))
        return pieces[0] if taps == 1 else self._node("Concat", pieces, self._new(f"{out}.taps"), axis=3)

    # ---- linear layers and the rest

    def _linear_weight(self, node: Any) -> str | None:
        """The quantized weight [out, in] of a linear layer; None if this is none, or not one of a quantized input."""
        name = node.input[1]
        if node.op_type == "Gemm":
            a = _attributes(node)
            plain = a.get("transB", 0) == 1 and not a.get("transA", 0) and a.get("alpha", 1) == a.get("beta", 1) == 1
        else:
            transpose = self.maker.get(name)
            plain = transpose is not None and transpose.op_type == "Transpose"
            name = transpose.input[0] if plain else name
        plain = plain and name in self.weights and len(self.weights[name].shape) == 2
        return name if plain and self._quantize_before(node.input[0]) else None

    def _linear(self, node: Any, name: str) -> None:
        """MatMul with the weights' scales on its columns, and the bias in float."""
        kernel = _kernel(self.weights[name], None)
        weight = self._dequantize(name, kernel.integers.T, kernel.scale, kernel.zero_point, 1)
        biased = node.op_type == "Gemm" and len(node.input) > 2
        end = self._new(f"{node.output[0]}.product") if biased else node.output[0]
        self._node("MatMul", [node.input[0], weight], end)
        if biased:
            bias = self._dequantized(node.input[2]) if node.input[2] in self.weights else node.input[2]
            self._node("Add", [end, bias], node.output[0])

    def _dequantized(self, name: str) -> str:
        """The weight as a value of the graph, in its own shape."""
        tensor = self.weights[name]
        if name in self.names:
            return f"{name}.value"
        integers = (tensor.integers().astype(np.int16) - 128).astype(np.int8)
        zero_point = (tensor.zero_point.astype(np.int16) - 128).astype(np.int8)
        return self._dequantize(name, integers, tensor.scale, zero_point, tensor.axis)

    def _dequantize(self, name: str, integers: Array, scale: Array, zero_point: Array, axis: int | None) -> str:
        """`name`.value = (integers - zero_point) * scale, along `axis`, or as a whole where it is None."""
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        base = self._new(name)
        tables = {f"{base}.levels": integers, f"{base}.scale": scale, f"{base}.zero_point": zero_point}
        inputs = [self._constant(key, np.ascontiguousarray(value)) for key, value in tables.items()]
        return self._node("DequantizeLinear", inputs, f"{base}.value", **({} if axis is None else {"axis": axis}))

    # ---- the graph

    def _only_user(self, name: str) -> Any:
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.results else None

    def _value(self, name: str) -> Any:
        """A constant's value; None for what is computed."""
        if name in self.weights:
            return self.weights[name].dequantize()
        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        node = self.maker.get(name)
        if node is not None and node.op_type == "Constant":
            return numpy_helper.to_array(_attributes(node)["value"])
        return None

    def _new(self, name: str) -> str:
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}.{self.names[name]}"

    def _constant(self, name: str, value: Array, *, shared: bool = False) -> str:
        if name not in self.constants or not shared:
            self.constants[name] = numpy_helper.from_array(value, name)
            self.graph.initializer.append(self.constants[name])
        return name

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _drop_unused(self) -> None:
        """Leave only what the outputs need, and no shapes of values that are gone."""
        needed, kept = set(self.results), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        initializers = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        for field, values in (("node", kept[::-1]), ("initializer", initializers), ("value_info", [])):
            self.graph.ClearField(field)
            getattr(self.graph, field).extend(values)


def _kernel(tensor: QuantizedTensor, bias: Array | None) -> _Kernel:
    outputs = tensor.shape[0]
    wide = [np.broadcast_to(part, outputs) for part in (tensor.scale, tensor.zero_point.astype(np.int16) - 128)]
    shift = np.zeros(outputs, np.float32) if bias is None else bias
    integers = (tensor.integers().astype(np.int16) - 128).astype(np.int8)
    return _Kernel(integers, wide[0].astype(np.float32), wide[1].astype(np.int8), shift)


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _along(attributes: Mapping[str, Any], key: str, axis: int) -> int:
    """A convolution's attribute for an axis of [B,H,W,C]."""
    return int(attributes.get(key, [1, 1])[axis - 1])


def _shape(value: Any) -> list[int | None]:
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else None for size in sizes]
