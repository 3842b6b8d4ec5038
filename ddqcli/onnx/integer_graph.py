"""An ONNX graph of torch's exporter with float weights -> the same graph in whole numbers; needs onnx, not torch.

A weight is (level - zero_point) * scale: an int8 tensor without any rounding. BatchNorm after a convolution is one factor and
one shift a channel: the factor goes into the scale, so the whole numbers stay what was trained. What stands between uint8 and
uint8,

    DequantizeLinear -> Conv <- DequantizeLinear <- int8;  Conv -> BatchNormalization -> Relu -> QuantizeLinear

onnxruntime runs as one QLinearConv. A convolution whose result stays float (before a residual addition) has no fast kernel
there; as a Gemm over its windows it has one. For both the shift is rounded to an int32 in units of the sums: the one value that
is rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from ddqcli.artifact.tensors import QuantizedTensor

Array = np.ndarray[Any, Any]
_FEWEST_CHANNELS = 16  # of a kernel that is worth gathering windows for
_LARGEST_SHIFT = 2**30


def rewrite(model: Any, weights: Mapping[str, QuantizedTensor]) -> Any:
    """The onnx.ModelProto with `weights` in the place of the float initializers of these names; changes `model`."""
    return _Rewriter(model, weights).run()


@dataclass
class _Kernel:
    """Weights as whole numbers, with one scale and shift for each output channel."""

    integers: Array  # int8 [K, C/groups, ...]
    scale: Array  # float32 [K]; may be negative, or 0
    zero_point: Array  # int8 [K]
    shift: Array  # float32 [K]

    @property
    def small(self) -> bool:
        """Whether so few channels go in (3, or 1 of a depthwise convolution) that whole numbers save neither time nor bytes."""
        return bool(self.integers.shape[1] < _FEWEST_CHANNELS)

    def floats(self) -> Array:
        spread = (-1, *[1] * (self.integers.ndim - 1))
        return (
            self.integers - self.zero_point.astype(np.float32).reshape(spread)
        ) * self.scale.reshape(spread)


class _Windows(NamedTuple):
    """How the windows of a convolution lie in an image; pairs are for both axes."""

    source: tuple[int, int]  # [H, W] of the image
    size: tuple[int, int]  # [H', W'] of the result
    pads: tuple[int, int, int, int]  # top, left, bottom, right
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def places(self) -> Array:
        """int32 [H' * W' * kh * kw]: the pixel of the padded image, counted row by row, that each window has at each tap."""
        rows, columns = (
            np.arange(self.size[axis])[:, None] * self.strides[axis]
            + np.arange(self.kernel[axis])[None] * self.dilations[axis]
            for axis in (0, 1)
        )  # [H', kh], [W', kw]
        width = self.source[1] + self.pads[1] + self.pads[3]
        return (
            (rows[:, None, :, None] * width + columns[None, :, None, :])
            .astype(np.int32)
            .reshape(-1)
        )


class _Rewriter:
    """One pass over the nodes in order: each is kept, or replaced by others that end in the same names."""

    def __init__(self, model: Any, weights: Mapping[str, QuantizedTensor]) -> None:
        self.model, self.graph, self.weights = model, model.graph, weights
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in (
                {node.input[0]} if node.op_type == "CastLike" else set(node.input)
            ):  # which sees but a type
                self.users.setdefault(name, []).append(node)
        self.results = {output.name for output in self.graph.output}
        self.shapes = {
            v.name: _shape(v)
            for v in (*self.graph.value_info, *self.graph.input, *self.graph.output)
        }
        self.nodes: list[Any] = []
        self.absorbed: set[str] = set()  # outputs of nodes that another one now does the work of
        self.clipped: dict[
            str, tuple[int, int]
        ] = {}  # output of a QuantizeLinear -> range that it is to be held in
        self.dequantized: dict[
            str, str
        ] = {}  # weight -> its value in the graph, where used as it is
        self.names: Counter[str] = Counter()

    def run(self) -> Any:
        for node in list(self.graph.node):
            if node.output and node.output[0] not in self.absorbed:
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
            kept = onnx.NodeProto()  # a copy, for others look at what the node was
            kept.CopyFrom(node)
            for at, name in enumerate(node.input):
                if name in self.weights:
                    kept.input[at] = self._dequantized(name)
            self.nodes.append(kept)

    # ---- convolutions

    def _conv(self, conv: Any) -> None:
        name, bias = conv.input[1], self._value(conv.input[2]) if len(conv.input) > 2 else None
        kernel, end = self._folded(conv, _kernel(self.weights[name], bias))
        whole = self._dequantize_before(conv.input[0])
        shift = self._whole_shift(kernel, whole) if whole else None
        after = self._quantize_after(end)
        windows = self._windows(conv)
        if (
            shift is not None and after and len(set(kernel.zero_point.tolist())) == 1
        ):  # as QLinearConv demands
            activation, quantize = after
            if activation is not None:
                self._move_clip(activation, quantize)
            self._emit_whole(conv, name, kernel, whole, shift, quantize.input[0])
        elif whole and windows and not kernel.small:
            self._emit_windows(conv, windows, name, kernel, whole, shift, end)
        else:
            weight = (
                self._constant(self._new(f"{name}.float"), kernel.floats())
                if kernel.small
                else None
            )
            weight = weight or self._dequantize(
                name, kernel.integers, kernel.scale, kernel.zero_point, 0
            )
            self._emit_conv(
                conv,
                [conv.input[0], weight, self._constant(self._new(f"{name}.shift"), kernel.shift)],
                end,
            )

    def _folded(self, conv: Any, kernel: _Kernel) -> tuple[_Kernel, str]:
        """The kernel with the BatchNorm that follows, if one does and nothing else sees what lies between; its output."""
        norm = self._only_user(conv.output[0])
        values = (
            [self._value(name) for name in norm.input[1:5]]
            if norm and norm.op_type == "BatchNormalization"
            else []
        )
        if not values or any(value is None for value in values):
            return kernel, conv.output[0]
        self.absorbed.add(norm.output[0])
        weight, bias, mean, variance = (value.astype(np.float64) for value in values)
        factor = weight / np.sqrt(variance + _attributes(norm).get("epsilon", 1e-5))
        shift = ((kernel.shift - mean) * factor + bias).astype(np.float32)
        return _Kernel(
            kernel.integers, (kernel.scale * factor).astype(np.float32), kernel.zero_point, shift
        ), norm.output[0]

    def _dequantize_before(self, name: str) -> Any:
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

    def _whole_shift(self, kernel: _Kernel, whole: Any) -> tuple[Array, Array] | None:
        """The shift in units of the sums, int32 [K], and the unit, float32 [K]; None where it has no such value."""
        unit = kernel.scale * self._value(whole.input[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            rounded = np.rint(kernel.shift.astype(np.float64) / unit)
        rounded[(unit == 0) & (kernel.shift == 0)] = 0
        return (
            (rounded.astype(np.int32), unit) if np.all(np.abs(rounded) < _LARGEST_SHIFT) else None
        )

    def _move_clip(self, activation: Any, quantize: Any) -> None:
        """Let the quantizer saturate in place of the activation: rounding keeps order, so clipping may come after it."""
        self.absorbed.add(activation.output[0])
        scale, zero_point = (self._value(name) for name in quantize.input[1:3])
        bounds = [0.0, np.inf]
        if activation.op_type == "Clip":
            given = [self._value(name) if name else None for name in activation.input[1:3]]
            bounds = [
                open_end if end is None else end
                for end, open_end in zip(given, (-np.inf, np.inf), strict=True)
            ]
        with np.errstate(over="ignore"):
            low, high = (
                int(np.clip(np.rint(np.float32(end) / scale) + zero_point, 0, 255))
                for end in bounds
            )
        if (low, high) != (0, 255):
            self.clipped[quantize.output[0]] = (low, high)
        quantize.input[0] = activation.input[0]

    def _clipped_quantize(self, quantize: Any) -> None:
        out = quantize.output[0]
        quantize.output[0] = self._new(f"{out}.wide")
        self.nodes.append(quantize)
        bounds = [
            self._constant(f"{out}.{at}", np.array(end, np.uint8))
            for at, end in enumerate(self.clipped[out])
        ]
        self._node("Clip", [quantize.output[0], *bounds], out)

    def _emit_whole(
        self,
        conv: Any,
        name: str,
        kernel: _Kernel,
        whole: Any,
        shift: tuple[Array, Array],
        end: str,
    ) -> None:
        """The convolution between dequantized integers. Three channels are made four, which halves its time."""
        x, integers = conv.input[0], kernel.integers
        lacking = -integers.shape[1] % 4
        if (
            integers.ndim == 4
            and lacking
            and _attributes(conv).get("group", 1) == 1
            and not kernel.zero_point.any()
        ):
            pads = self._constant(
                self._new(f"{name}.pads"), np.array([0] * 5 + [lacking, 0, 0], np.int64)
            )
            padded = self._node(
                "Pad", [whole.input[0], pads, whole.input[2]], self._new(f"{x}.padded")
            )
            x = self._node("DequantizeLinear", [padded, *whole.input[1:3]], self._new(f"{x}.wide"))
            integers = np.pad(integers, ((0, 0), (0, lacking), (0, 0), (0, 0)))
        weight = self._dequantize(name, integers, kernel.scale, kernel.zero_point, 0)
        self._emit_conv(conv, [x, weight, self._shift(name, shift)], end)

    def _emit_conv(self, conv: Any, inputs: list[str], end: str) -> None:
        del conv.input[:]
        conv.input.extend(inputs)
        conv.output[0] = end
        self.nodes.append(conv)

    def _windows(self, conv: Any) -> _Windows | None:
        """Those of a plain 2-D convolution of images of known size."""
        before, after = (self.shapes.get(name, []) for name in (conv.input[0], conv.output[0]))
        a = _attributes(conv)
        plain = a.get("group", 1) == 1 and a.get("auto_pad", b"NOTSET") == b"NOTSET"
        if not plain or len(before) != 4 or len(after) != 4 or None in (*before[1:], *after[1:]):
            return None
        steps = (tuple(a.get(key, (1, 1))) for key in ("strides", "dilations"))
        kernel = self.weights[conv.input[1]].shape[2:]
        return _Windows(
            tuple(before[2:]), tuple(after[2:]), tuple(a.get("pads", (0, 0, 0, 0))), kernel, *steps
        )

    def _emit_windows(
        self,
        conv: Any,
        windows: _Windows,
        name: str,
        kernel: _Kernel,
        whole: Any,
        shift: tuple[Array, Array] | None,
        end: str,
    ) -> None:
        """uint8 [B,C,H,W] -> pixels [B,H*W,C] -> windows [B*H'*W',kh*kw*C] -> Gemm -> [B,H',W',K] -> [B,K,H',W']."""
        out, channels = conv.output[0], kernel.integers.shape[1]
        current = self._node(
            "Transpose", [whole.input[0]], self._new(f"{out}.pixels"), perm=[0, 2, 3, 1]
        )
        if any(windows.pads):
            top, left, bottom, right = windows.pads
            pads = self._constant(
                f"{out}.pads", np.array([0, top, left, 0, 0, bottom, right, 0], np.int64)
            )
            current = self._node("Pad", [current, pads, whole.input[2]], self._new(f"{out}.padded"))
        if windows.taps > 1 or windows.source != windows.size:
            current = self._reshaped(current, [0, -1, channels])
            places = self._constant(f"{windows}", windows.places(), shared=True)
            current = self._node("Gather", [current, places], self._new(f"{out}.windows"), axis=1)
        current = self._reshaped(current, [-1, windows.taps * channels])
        rows = self._node(
            "DequantizeLinear", [current, *whole.input[1:3]], self._new(f"{out}.rows")
        )
        matrix = kernel.integers.transpose(2, 3, 1, 0).reshape(-1, len(kernel.scale))
        product = self._product(rows, name, matrix, kernel, shift, self._new(f"{out}.product"))
        image = self._reshaped(product, [-1, *windows.size, len(kernel.scale)])
        self._node("Transpose", [image], end, perm=[0, 3, 1, 2])

    # ---- linear layers and the rest

    def _linear_weight(self, node: Any) -> str | None:
        """The quantized weight [out, in] of a linear layer; None if this is none, or not one of a quantized input."""
        name = node.input[1]
        if node.op_type == "Gemm":
            a = _attributes(node)
            plain = (
                a.get("transB", 0) == 1
                and not a.get("transA", 0)
                and a.get("alpha", 1) == a.get("beta", 1) == 1
            )
        else:
            transpose = self.maker.get(name)
            plain = transpose is not None and transpose.op_type == "Transpose"
            name = transpose.input[0] if plain else name
        plain = plain and name in self.weights and len(self.weights[name].shape) == 2
        return name if plain and self._dequantize_before(node.input[0]) else None

    def _linear(self, node: Any, name: str) -> None:
        kernel = _kernel(
            self.weights[name], self._value(node.input[2]) if len(node.input) > 2 else None
        )
        self._product(node.input[0], name, kernel.integers.T, kernel, None, node.output[0])

    def _product(
        self,
        x: str,
        name: str,
        matrix: Array,
        kernel: _Kernel,
        shift: tuple[Array, Array] | None,
        end: str,
    ) -> str:
        """Dequantized x [..., n] times the matrix [n, K], plus the shift [K], which stays float where `shift` is None."""
        weight = self._dequantize(name, matrix, kernel.scale, kernel.zero_point, 1)
        if shift is not None:
            return self._node("Gemm", [x, weight, self._shift(name, shift)], end)
        product = self._node("MatMul", [x, weight], self._new(f"{name}.product"))
        # Sub, for of MatMul and Add onnxruntime makes a Gemm, which takes no float shift beside whole numbers.
        return self._node(
            "Sub", [product, self._constant(self._new(f"{name}.minus_shift"), -kernel.shift)], end
        )

    def _shift(self, name: str, shift: tuple[Array, Array]) -> str:
        return self._dequantize(f"{name}.shift", shift[0], shift[1], np.zeros_like(shift[0]), 0)

    def _dequantized(self, name: str) -> str:
        """The weight as a value of the graph, in its own shape; a bias stays as it is, for whole numbers would save nothing."""
        tensor = self.weights[name]
        if len(tensor.shape) < 2:
            return name
        if name not in self.dequantized:
            integers, zero_point = _int8(tensor)
            self.dequantized[name] = self._dequantize(
                name, integers, tensor.scale, zero_point, tensor.axis
            )
        return self.dequantized[name]

    def _dequantize(
        self, name: str, integers: Array, scale: Array, zero_point: Array, axis: int | None
    ) -> str:
        """(integers - zero_point) * scale, along `axis`, or as a whole where it is None."""
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        base = self._new(name)
        tables = {
            f"{base}.integers": integers,
            f"{base}.scale": scale,
            f"{base}.zero_point": zero_point,
        }
        inputs = [self._constant(key, np.ascontiguousarray(value)) for key, value in tables.items()]
        return self._node(
            "DequantizeLinear", inputs, f"{base}.value", **({} if axis is None else {"axis": axis})
        )

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
        if node is None or node.op_type not in ("Constant", "Cast", "CastLike", "Identity"):
            return None
        if node.op_type != "Constant":
            return self._value(node.input[0])
        (value,) = _attributes(node).values()
        return (
            numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
        )

    def _new(self, name: str) -> str:
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}.{self.names[name]}"

    def _constant(self, name: str, value: Array, *, shared: bool = False) -> str:
        if not shared or name not in self.constants:
            self.constants[name] = numpy_helper.from_array(value, name)
            self.graph.initializer.append(self.constants[name])
        return name

    def _reshaped(self, x: str, shape: list[int]) -> str:
        target = self._constant(f"shape {shape}", np.array(shape, np.int64), shared=True)
        return self._node("Reshape", [x, target], self._new(f"{x}.reshaped"))

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _drop_unused(self) -> None:
        """Leave only what the outputs need, no shapes of values that are gone, and nothing of where the source code lay."""
        needed, kept = set(self.results), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                node.ClearField("metadata_props")
                kept.append(node)
        initializers = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        for field, values in (
            ("node", kept[::-1]),
            ("initializer", initializers),
            ("value_info", []),
        ):
            self.graph.ClearField(field)
            getattr(self.graph, field).extend(values)
        self.graph.ClearField("metadata_props")
        for value in (*self.graph.input, *self.graph.output):
            value.ClearField("metadata_props")
            if (
                value.type.tensor_type.shape.dim
                and (batch := value.type.tensor_type.shape.dim[0]).dim_param
            ):
                batch.dim_param = "batch"


def _int8(tensor: QuantizedTensor) -> tuple[Array, Array]:
    """int8 [shape] and zero points [groups]: 0 where the values fit so, for that is what onnxruntime is fast at."""
    spread = [1] * len(tensor.shape)
    if tensor.axis is not None:
        spread[tensor.axis] = -1
    level, zero_point = tensor.integers().astype(np.int16), tensor.zero_point.astype(np.int16)
    centred = level - zero_point.reshape(spread)
    if not level.size or (centred.min() >= -128 and centred.max() <= 127):
        return centred.astype(np.int8), np.zeros(len(zero_point), np.int8)
    return (level - 128).astype(np.int8), (zero_point - 128).astype(np.int8)


def _kernel(tensor: QuantizedTensor, bias: Array | None) -> _Kernel:
    outputs = tensor.shape[0]
    integers, zero_point = _int8(tensor)
    shift = np.zeros(outputs, np.float32) if bias is None else np.broadcast_to(bias, outputs)
    return _Kernel(
        integers,
        np.broadcast_to(tensor.scale, outputs),
        np.broadcast_to(zero_point, outputs),
        shift,
    )


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _shape(value: Any) -> list[int | None]:
    """Sizes; None for those that are open."""
    return [
        d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim
    ]
