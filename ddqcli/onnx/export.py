"""A loaded model as an ONNX file in integers: weights int8, activations uint8.

torch.onnx.export writes the float network with the quantizers of inputs in it. `integer_graph` then
puts the weights' levels in place of the float weights, in forms that onnxruntime runs in integer
arithmetic.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.data.trees import (
    Tree,
    call,
    copied,
    input_names,
    map_tensors,
    shared_length,
    sliced,
    take_tensors_alone,
    tensor_names,
    tensors,
)
from ddqcli.errors import UsageError
from ddqcli.onnx.refusal import active_layers, refusal
from ddqcli.qat.input_hooks import input_quantizer, remove_input_quantizer
from ddqcli.qat.network_copy import copy_network
from ddqcli.quant.frozen_input import FrozenInputQuantizer
from ddqcli.quant.grid import GRID_CELLS

if TYPE_CHECKING:
    import onnx

OPSET = 21
Runtime = Literal["onnxruntime", "openvino"]
_REQUIRED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise UsageError unless the extra `ddqcli[onnx]` is installed."""
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {', '.join(missing)}; run pip install 'ddqcli[onnx]'.")


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file in memory."""

    raw: bytes
    proto: onnx.ModelProto
    unpacked: dict[str, NDArray[Any]]  # the stored weights by the value to which they unpack


def make_onnx(
    model: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    example: Tree,
    about: Mapping[str, str],
    runtime: Runtime = "onnxruntime",
) -> OnnxModel:
    """Return a model as an ONNX file with an open batch size.

    Args:
        model: the network as `ddqcli.load` returns it.
        weights: its quantized tensors under all of their names.
        example: inputs of some samples, a tree of tensors [B, ...].
        about: metadata of the file.
        runtime: the one that shall be fast. Others run the file, too, with the same answers.

    Raises UsageError, which names the layer, for what ONNX cannot express.
    """
    require_onnx()
    import onnx
    import onnxscript

    from ddqcli.onnx.integer_graph import rewrite
    from ddqcli.onnx.seal import sealed

    model = copy_network(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in model.modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, FrozenInputQuantizer):
            module.input_quantizer = _OnnxInputQuantizer(quantizer)
    proto = _export_float(model, _two_samples(example))
    unpacked = rewrite(proto, weights, for_openvino=runtime == "openvino")
    exporter = f"torch {torch.__version__}, onnxscript {onnxscript.__version__}"
    raw = sealed(proto, {**about, "runtime": runtime, "exporter": exporter})
    onnx.checker.check_model(proto)
    return OnnxModel(raw, proto, unpacked)


def make_float_onnx(model: nn.Module, example: Tree) -> bytes:
    """Return the model without the quantizers of its inputs, in float, to compare times."""
    from ddqcli.onnx.integer_graph import rewrite

    model = copy_network(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in model.modules():
        if input_quantizer(module) is not None:
            remove_input_quantizer(module)
    proto = _export_float(model, _two_samples(example))
    rewrite(proto, {})
    return bytes(proto.SerializeToString())


class _OnnxInputQuantizer(nn.Module):
    """A FrozenInputQuantizer as ONNX nodes, the last of them DequantizeLinear."""

    observing = False
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    half_step: Tensor
    offset: Tensor
    level_of_cell: Tensor

    def __init__(self, frozen: FrozenInputQuantizer) -> None:
        super().__init__()
        self.uniform, self.max_level = frozen.uniform, len(frozen.values) - 1
        tables = {
            "scale": frozen.scale,
            "zero_point": torch.tensor(frozen.zero_point, dtype=torch.uint8),
        }
        if not frozen.uniform:
            levels = (frozen.values / frozen.scale + frozen.zero_point).to(torch.uint8)
            tables |= {
                "half_step": frozen.scale / 2,
                "offset": torch.tensor(2.0 * frozen.zero_point + 1),
                "low": torch.tensor(0.0),
                "high": torch.tensor(GRID_CELLS - 1.0),
                "level_of_cell": levels[frozen.nearest.long()],
            }
        elif self.max_level < 255:
            tables |= {
                "low": torch.tensor(0, dtype=torch.uint8),
                "high": torch.tensor(self.max_level, dtype=torch.uint8),
            }
        for name, table in tables.items():
            self.register_buffer(name, table.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        u8, shape = torch.uint8, x.shape
        if self.uniform:
            code = _node("QuantizeLinear", x, self.scale, self.zero_point, dtype=u8, shape=shape)
            if self.max_level < 255:
                code = _node("Clip", code, self.low, self.high, dtype=u8, shape=shape)
        else:  # as FrozenInputQuantizer.forward
            steps = _node("Floor", _node("Div", x, self.half_step, shape=shape), shape=shape)
            cell = _node("Add", steps, self.offset, shape=shape)
            cell = _node("Clip", cell, self.low, self.high, shape=shape)
            cell = _node("Cast", cell, dtype=torch.int32, shape=shape, to=6)
            code = _node("Gather", self.level_of_cell, cell, dtype=u8, shape=shape)
        return _node("DequantizeLinear", code, self.scale, self.zero_point, shape=shape)


def _node(
    op_type: str,
    *inputs: Tensor,
    shape: Sequence[int | torch.SymInt],
    dtype: torch.dtype = torch.float32,
    **attributes: int,
) -> Tensor:
    """Stand for an ONNX node with an output of this shape and dtype."""
    output: Tensor = torch.onnx.ops.symbolic(
        op_type, inputs, dict(attributes), dtype=dtype, shape=shape, version=OPSET
    )
    return output


def _checked_output(model: nn.Module, example: Tree) -> Tree:
    """Return the output. Raise UsageError for recurrent layers that torch's exporter cannot write.

    It knows neither proj_size, which it leaves out without a word, nor packed sequences.
    """

    def refuse_packed(module: nn.Module, inputs: Any) -> None:
        if any(isinstance(x, PackedSequence) for x in inputs):
            name = next(n for n, m in model.named_modules() if m is module)
            raise UsageError(
                f"The model of the layer {name} cannot be exported to ONNX: a graph has no packed "
                "sequences; give the layer padded ones in eval mode."
            )

    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise UsageError(
                f"The model of the layer {name} cannot be exported to ONNX: ONNX's LSTM has no "
                "proj_size; use an LSTM without it and a linear layer."
            )
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    hooks = [layer.register_forward_pre_hook(refuse_packed) for layer in layers]
    try:
        return call(model, copied(example))
    finally:
        for hook in hooks:
            hook.remove()


def _export_float(model: nn.Module, example: Tree) -> onnx.ModelProto:
    """Export with float weights by torch's exporter. Raises UsageError if it fails.

    `model` is a copy; its forward is replaced.
    """
    with _silenced(), torch.no_grad(), active_layers(model) as active:
        try:
            output = _checked_output(model, example)
            _refuse_types(example, output)
            inputs = tuple(tensors(example))
            take_tensors_alone(model, example)
            batch = {0: _first_dimension(example)}
            shapes = tuple(batch if x.ndim else None for x in inputs)
            program = torch.export.export(model, inputs, dynamic_shapes=(shapes,))
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=input_names(example),
                output_names=tensor_names(output, "output"),
                verbose=False,
            )
            assert exported is not None  # with dynamo=True
            _fold_sizes(exported.model)
            return exported.model_proto
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(refusal(error, active)) from error


def _refuse_types(inputs: Tree, output: Tree) -> None:
    """Raise UsageError for numbers that a graph, or NumPy beside it, does not have."""
    names = input_names(inputs) + tensor_names(output, "output")
    for name, tensor in zip(names, tensors(inputs) + tensors(output), strict=True):
        if tensor.is_complex() or tensor.dtype == torch.bfloat16:
            remedy = "torch.view_as_real(x)" if tensor.is_complex() else "x.float()"
            raise UsageError(
                f"The model cannot be exported to ONNX: its {name} is {tensor.dtype}, which has no "
                f"place there; use {remedy}."
            )


def _fold_sizes(model: Any) -> None:
    """Compute shapes, indices and pads that no weight or input has a part in."""
    from onnxscript.optimizer import fold_constants

    def computes_sizes(node: Any) -> bool | None:
        weights = [value for value in node.inputs if value is not None and value.is_initializer()]
        return False if weights and node.op_type != "Shape" else None

    fold_constants(model, should_fold=computes_sizes)


def _first_dimension(example: Tree) -> Any:
    """Return the open size of the first dimension of each tensor.

    Tensors that differ in it, such as texts one after the other and their offsets, have one each.
    """
    if shared_length(example) is None:
        return torch.export.Dim.DYNAMIC
    return torch.export.Dim("batch")


def _two_samples(example: Tree) -> Tree:
    """Return a batch of two: from one, the exporter would conclude that there is always one."""
    if shared_length(example) is not None:
        example = sliced(example, [0, -1])
    return map_tensors(lambda x: x.cpu().contiguous(), example)


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide the exporter's warnings, logs and graphs, which are about its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
