"""Rewrite torch's float ONNX graph to integer arithmetic; needs onnx, not torch.

A weight is (level - zero_point) * scale: an int8 tensor without any rounding, stored packed where
that is smaller. BatchNorm after a convolution is one factor and one shift a channel: the factor
goes into the scale, so the integers stay what was trained. onnxruntime runs what stands between
uint8 and uint8,

    DequantizeLinear -> Conv <- DequantizeLinear <- int8
                        Conv -> BatchNormalization -> Relu -> QuantizeLinear

as one QLinearConv. A convolution with a float result (before a residual addition) has no fast
integer kernel there; as a Gemm over its windows it has one. For both, the shift is rounded to an
int32 in units of the integer sums. It is the only value that is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx
from onnx import NodeProto

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.onnx.graph import Array, Graph, attributes
from ddqcli.onnx.kernel import Kernel, to_int8
from ddqcli.onnx.packed import add_integers
from ddqcli.onnx.weights import add_dequantized, add_floats, add_shift
from ddqcli.onnx.windows import Windows


def rewrite(
    model: onnx.ModelProto,
    weights: Mapping[str, QuantizedTensor],
    *,
    for_openvino: bool = False,
) -> dict[str, Array]:
    """Put `weights` in place of the float initializers of these names.

    `for_openvino` leaves convolutions with a float result as they are, since OpenVINO has integer
    kernels for them, and transposes weights of linear layers where it still sees their integers.

    Returns the int8 or float32 tensors that the file holds, by the value to which they unpack.
    """
    rewriter = _Rewriter(model.graph, weights, for_openvino)
    rewriter.run()
    return rewriter.graph.unpacked


class _Rewriter:
    """One pass over the nodes in order; each is kept, or replaced by nodes with its outputs."""

    def __init__(
        self,
        proto: onnx.GraphProto,
        weights: Mapping[str, QuantizedTensor],
        for_openvino: bool,
    ) -> None:
        self.graph, self.weights = Graph(proto), weights
        self.for_openvino = for_openvino
        self.absorbed: set[str] = set()  # outputs of nodes whose work another node now does
        self.clip_ranges: dict[str, tuple[int, int]] = {}  # by output of a QuantizeLinear
        self.dequantized: dict[str, str] = {}  # weight -> its value in its own shape

    def run(self) -> None:
        for node in self.graph.old_nodes:
            self._shorten_constants(node)
        for node in self.graph.old_nodes:
            if node.output and node.output[0] not in self.absorbed:
                self._replace(node)
        self.graph.finish()

    def _shorten_constants(self, node: NodeProto) -> None:
        """Let a node refer to constants that are stored once, under short names."""
        graph = self.graph
        for k, name in enumerate(node.input):
            value = graph.value(name)
            if value is None:
                continue
            if graph.producer(name, "Constant") or value.dtype == np.int64:
                node.input[k] = graph.shared_constant("constant", value)
            elif name.endswith("input_quantizer.zero_point"):
                node.input[k] = graph.shared_constant("zero_point", value)
            elif name.endswith("input_quantizer.scale"):
                short = name.replace("input_quantizer.", "input_")
                node.input[k] = graph.shared(short, partial(graph.add_constant, short, value))

    def _replace(self, node: NodeProto) -> None:
        if node.op_type == "Conv" and node.input[1] in self.weights:
            self._replace_conv(node)
        elif node.op_type in ("Gemm", "MatMul") and (name := self._linear_weight(node)):
            self._replace_linear(node, name)
        elif node.output[0] in self.clip_ranges:
            self._add_clipped_quantize(node)
        elif node.op_type == "CastLike" and (to := self.graph.types.get(node.input[1])):
            # onnxruntime folds no CastLike, and fuses no Clip whose bounds are not constant.
            self.graph.add_node("Cast", node.input[:1], node.output[0], to=to)
        else:
            copy = NodeProto()  # the original is still looked up by other nodes
            copy.CopyFrom(node)
            for k, name in enumerate(node.input):
                if name in self.weights:
                    copy.input[k] = self._dequantized_weight(name)
                elif node.op_type == "BatchNormalization" and k in (3, 4):
                    copy.input[k] = self._statistic(name)
            self.graph.nodes.append(copy)

    # ---- convolutions

    def _replace_conv(self, conv: NodeProto) -> None:
        tensor = self.weights[conv.input[1]]
        kernel, output = self._fold_norm(conv, Kernel.of(tensor, self._bias(conv)))
        name = self.graph.new_name(conv.input[1])
        dequantize = self.graph.producer(conv.input[0], "DequantizeLinear")
        if dequantize is None:
            self._add_float_conv(conv, name, kernel, output)
            return
        shift = kernel.integer_shift(self.graph.constant(dequantize.input[1]))
        quantize = self._quantize_after(output)
        windows = None if self.for_openvino else self._windows(conv)
        is_integer = shift is not None and kernel.has_one_zero_point  # as QLinearConv requires
        if shift is not None and is_integer and (quantize or self.for_openvino):
            if quantize:
                self._absorb_activation(output, quantize)
            self._add_integer_conv(conv, name, kernel, dequantize, shift, output)
        elif windows and not kernel.is_small:
            self._add_window_product(conv, windows, name, kernel, dequantize, shift, output)
        else:
            self._add_float_conv(conv, name, kernel, output)

    def _fold_norm(self, conv: NodeProto, kernel: Kernel) -> tuple[Kernel, str]:
        """Fold a BatchNorm that alone uses the convolution; return the kernel and its output."""
        norm = self.graph.only_user(conv.output[0])
        if norm is None or norm.op_type != "BatchNormalization":
            return kernel, conv.output[0]
        values = [self.graph.value(name) for name in norm.input[1:5]]
        weight, bias, mean, variance = values
        if weight is None or bias is None or mean is None or variance is None:
            return kernel, conv.output[0]
        self.absorbed.add(norm.output[0])
        epsilon = attributes(norm).get("epsilon", 1e-5)
        return kernel.folded(weight, bias, mean, variance, epsilon), norm.output[0]

    def _statistic(self, name: str) -> str:
        """Return mean or variance of a BatchNorm; folding has left them constant (qat.norms)."""
        value = self.graph.value(name)
        if value is None or not value.size or np.any(value != value[0]):
            return name
        return self.graph.filled(value)

    def _quantize_after(self, name: str) -> NodeProto | None:
        """Return the QuantizeLinear that alone uses a value, directly or after Relu or Clip."""
        node = self.graph.only_user(name)
        if node is not None and node.op_type in ("Relu", "Clip"):
            node = self.graph.only_user(node.output[0])
        return node if node is not None and node.op_type == "QuantizeLinear" else None

    def _absorb_activation(self, name: str, quantize: NodeProto) -> None:
        """Let the quantizer of the value `name` saturate in place of a Relu or Clip between them.

        Rounding keeps the order of values, so clipping may come after it.
        """
        activation = self.graph.only_user(name)
        if activation is None or activation.op_type == "QuantizeLinear":
            return
        self.absorbed.add(activation.output[0])
        scale, zero_point = (self.graph.constant(value) for value in quantize.input[1:3])
        with np.errstate(over="ignore"):
            low, high = (
                int(np.clip(np.rint(np.float32(bound) / scale) + zero_point, 0, 255))
                for bound in self._bounds(activation)
            )
        if (low, high) != (0, 255):
            self.clip_ranges[quantize.output[0]] = (low, high)
        quantize.input[0] = name

    def _bounds(self, activation: NodeProto) -> tuple[Array | float, Array | float]:
        """Return the range of a Relu or Clip."""
        if activation.op_type == "Relu":
            return 0.0, np.inf
        low, high = (self.graph.value(name) if name else None for name in activation.input[1:3])
        return -np.inf if low is None else low, np.inf if high is None else high

    def _add_clipped_quantize(self, quantize: NodeProto) -> None:
        output = quantize.output[0]
        quantize.output[0] = self.graph.new_name(f"{output}.wide")
        self.graph.nodes.append(quantize)
        bounds = [
            self.graph.shared_constant("bound", np.array(bound, np.uint8))
            for bound in self.clip_ranges[output]
        ]
        self.graph.add_node("Clip", [quantize.output[0], *bounds], output)

    def _add_integer_conv(
        self,
        conv: NodeProto,
        name: str,
        kernel: Kernel,
        dequantize: NodeProto,
        shift: Array,
        output: str,
    ) -> None:
        """Add a convolution between dequantized integers.

        For onnxruntime, three input channels are padded to four, which halves its time.
        """
        graph, x, integers = self.graph, conv.input[0], kernel.integers
        missing = -integers.shape[1] % 4
        is_plain = integers.ndim == 4 and attributes(conv).get("group", 1) == 1
        if missing and is_plain and not kernel.zero_point.any() and not self.for_openvino:
            pads = np.array([0] * 5 + [missing, 0, 0], np.int64)
            pads_name = graph.shared_constant("pads", pads)
            codes, scale, zero_point = dequantize.input[:3]
            padded = graph.add_node(
                "Pad", [codes, pads_name, zero_point], graph.new_name(f"{x}.padded")
            )
            x = graph.add_node(
                "DequantizeLinear", [padded, scale, zero_point], graph.new_name(f"{x}.wide")
            )
            integers = np.pad(integers, ((0, 0), (0, missing), (0, 0), (0, 0)))
        stored = add_integers(graph, name, integers, 0)
        weight, weight_scale = add_dequantized(graph, name, stored, kernel, 0)
        bias = add_shift(graph, name, shift, weight_scale, dequantize.input[1])
        self._add_conv(conv, [x, weight, bias], name, output)

    def _add_float_conv(self, conv: NodeProto, name: str, kernel: Kernel, output: str) -> None:
        """Add a convolution that runs in float."""
        weight = add_floats(
            self.graph, name, kernel.integers, kernel.scale, kernel.zero_point, axis=0
        )
        shift = self.graph.add_constant(f"{name}.shift", kernel.shift)
        self._add_conv(conv, [conv.input[0], weight, shift], name, output)

    def _add_conv(self, conv: NodeProto, inputs: list[str], name: str, output: str) -> None:
        del conv.input[:]
        conv.input.extend(inputs)
        conv.output[0] = output
        self.graph.nodes.append(conv)

    def _windows(self, conv: NodeProto) -> Windows | None:
        """Return the windows of a plain 2-D convolution of images of known size."""
        image, output = (
            self.graph.shapes.get(name, []) for name in (conv.input[0], conv.output[0])
        )
        a = attributes(conv)
        is_plain = a.get("group", 1) == 1 and a.get("auto_pad", b"NOTSET") == b"NOTSET"
        sizes = [size for size in (*image[1:], *output[1:]) if size is not None]
        if not is_plain or len(image) != 4 or len(sizes) != 6:
            return None
        _, height, width, _, out_height, out_width = sizes
        kernel_height, kernel_width = self.weights[conv.input[1]].shape[2:]
        return Windows(
            image=(height, width),
            output=(out_height, out_width),
            pads=tuple(a.get("pads", (0, 0, 0, 0))),
            kernel=(kernel_height, kernel_width),
            strides=tuple(a.get("strides", (1, 1))),
            dilations=tuple(a.get("dilations", (1, 1))),
        )

    def _add_window_product(
        self,
        conv: NodeProto,
        windows: Windows,
        name: str,
        kernel: Kernel,
        dequantize: NodeProto,
        shift: Array | None,
        output: str,
    ) -> None:
        """Add a convolution as a matrix product over its windows.

        uint8 [B,C,H,W] -> pixels [B,H*W,C] -> windows [B*H'*W',kh*kw*C] -> Gemm -> [B,H',W',K]
        -> [B,K,H',W']
        """
        graph, base = self.graph, conv.output[0]
        channels, outputs = kernel.integers.shape[1], len(kernel.scale)
        codes, scale, zero_point = dequantize.input[:3]
        x = graph.add_node(
            "Transpose", [codes], graph.new_name(f"{base}.pixels"), perm=[0, 2, 3, 1]
        )
        if any(windows.pads):
            top, left, bottom, right = windows.pads
            pads = graph.shared_constant(
                "pads", np.array([0, top, left, 0, 0, bottom, right, 0], np.int64)
            )
            x = graph.add_node("Pad", [x, pads, zero_point], graph.new_name(f"{base}.padded"))
        if not windows.are_pixels:
            x = graph.add_reshape(x, [0, -1, channels])
            pixels = graph.shared(f"{windows}", lambda: self._add_pixels(windows))
            x = graph.add_node("Gather", [x, pixels], graph.new_name(f"{base}.windows"), axis=1)
        x = graph.add_reshape(x, [-1, windows.taps * channels])
        rows = graph.add_node(
            "DequantizeLinear", [x, scale, zero_point], graph.new_name(f"{base}.rows")
        )
        matrix = add_integers(
            graph, name, kernel.integers.transpose(2, 3, 1, 0).reshape(-1, outputs), 1
        )
        product = f"{name}.windows_product"
        weight, weight_scale = add_dequantized(graph, name, matrix, kernel, 1)
        if shift is None:
            self._add_float_product(rows, weight, name, kernel.shift, product)
        else:
            bias = add_shift(graph, name, shift, weight_scale, scale)
            graph.add_node("Gemm", [rows, weight, bias], product)
        image = graph.add_reshape(product, [-1, *windows.output, outputs])
        graph.add_node("Transpose", [image], output, perm=[0, 3, 1, 2])

    def _add_pixels(self, windows: Windows) -> str:
        rows, columns = (
            self.graph.add_constant(self.graph.new_name(f"window {part}"), value)
            for part, value in zip(("rows", "columns"), windows.pixels(), strict=True)
        )
        return self.graph.add_node("Add", [rows, columns], self.graph.new_name("window pixels"))

    # ---- linear layers

    def _replace_linear(self, node: NodeProto, weight: str) -> None:
        kernel = Kernel.of(self.weights[weight], self._bias(node))
        name = self.graph.new_name(weight)
        value = add_integers(self.graph, name, kernel.integers, 0)
        if self.for_openvino:
            value, _ = add_dequantized(self.graph, name, value, kernel, 0)
        value = self.graph.add_node("Transpose", [value], f"{name}.matrix", perm=[1, 0])
        if not self.for_openvino:
            value, _ = add_dequantized(self.graph, name, value, kernel, 1)
        self._add_float_product(node.input[0], value, name, kernel.shift, node.output[0])

    def _linear_weight(self, node: NodeProto) -> str | None:
        """Return the quantized weight [out, in] of a linear layer with quantized input, or None."""
        name = node.input[1]
        if node.op_type == "Gemm":
            a = attributes(node)
            factors = a.get("alpha", 1), a.get("beta", 1)
            if not a.get("transB", 0) or a.get("transA", 0) or factors != (1, 1):
                return None
        else:
            transpose = self.graph.producer(name, "Transpose")
            if transpose is None:
                return None
            name = transpose.input[0]
        is_matrix = name in self.weights and len(self.weights[name].shape) == 2
        is_quantized = self.graph.producer(node.input[0], "DequantizeLinear") is not None
        return name if is_matrix and is_quantized else None

    def _add_float_product(self, x: str, weight: str, name: str, shift: Array, output: str) -> None:
        """Add dequantized x [..., n] times a dequantized weight [n, K], plus a float shift [K]."""
        graph = self.graph
        product = graph.add_node("MatMul", [x, weight], f"{name}.product")
        # Sub, because onnxruntime fuses MatMul and Add to a Gemm, which takes no float shift beside
        # integers.
        minus_shift = graph.add_constant(f"{name}.minus_shift", -shift)
        graph.add_node("Sub", [product, minus_shift], output)

    # ---- other users of weights

    def _bias(self, node: NodeProto) -> Array | None:
        return self.graph.value(node.input[2]) if len(node.input) > 2 else None

    def _dequantized_weight(self, name: str) -> str:
        """Return the weight's value in its own shape. Biases stay float: int8 saves nothing."""
        tensor = self.weights[name]
        if len(tensor.shape) < 2:
            return name
        if name not in self.dequantized:
            integers, zero_point = to_int8(tensor)
            base = self.graph.new_name(name)
            self.dequantized[name] = add_floats(
                self.graph, base, integers, tensor.scale, zero_point, tensor.axis
            )
        return self.dequantized[name]
