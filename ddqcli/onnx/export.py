"""A loaded model as an ONNX file in integers: weights int8, activations uint8.

torch.onnx.export writes the float network with the quantizers of inputs in it. `integer_graph` then
puts the weights' levels in place of the float weights, in forms that onnxruntime runs in integer
arithmetic.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.data.trees import Tree, arguments, map_tensors, sliced, tensor_names
from ddqcli.errors import UsageError
from ddqcli.qat.input_hooks import input_quantizer, remove_input_quantizer
from ddqcli.qat.network_copy import copy_network
from ddqcli.quant.frozen_input import FrozenInputQuantizer
from ddqcli.quant.grid import GRID_CELLS

if TYPE_CHECKING:
    import onnx

OPSET = 21
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
) -> OnnxModel:
    """Return a model as an ONNX file with an open batch size.

    Args:
        model: the network as `ddqcli.load` returns it.
        weights: its quantized tensors under all of their names.
        example: inputs of some samples, a tree of tensors [B, ...].
        about: metadata of the file.

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
    unpacked = rewrite(proto, weights)
    exporter = f"torch {torch.__version__}, onnxscript {onnxscript.__version__}"
    raw = sealed(proto, {**about, "exporter": exporter})
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


def _refuse_projections(model: nn.Module) -> None:
    """Raise UsageError for a layer that torch's exporter writes as another one, without a word."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise UsageError(
                f"The model of the layer {name} cannot be exported to ONNX: ONNX's LSTM has no "
                "proj_size; use an LSTM without it and a linear layer."
            )


def _export_float(model: nn.Module, example: Tree) -> onnx.ModelProto:
    """Export with float weights by torch's exporter. Raises UsageError if it fails."""
    _refuse_projections(model)
    with _silenced(), torch.no_grad(), _active_layers(model) as active:
        try:
            positional, named = arguments(example)
            batch = {0: torch.export.Dim("batch")}
            shapes = map_tensors(lambda x: batch if x.ndim else None, named or positional)
            program = torch.export.export(model, positional, named, dynamic_shapes=shapes)
            outputs = model(*positional, **named)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=tensor_names(example, "input"),
                output_names=tensor_names(outputs, "output"),
                verbose=False,
            )
            assert exported is not None  # with dynamo=True
            return exported.model_proto
        except Exception as error:
            layer = active[-1] if active else _layer_of(error)
            where = f"of the layer {layer} " if layer else ""
            raise UsageError(
                f"The model {where}cannot be exported to ONNX: {_first_cause(error)}"
            ) from error


def _two_samples(example: Tree) -> Tree:
    """Return a batch of two: from one, the exporter would conclude that there is always one."""
    return map_tensors(lambda x: x.cpu().contiguous(), sliced(example, [0, -1]))


@contextmanager
def _active_layers(model: nn.Module) -> Iterator[list[str]]:
    """Provide the names of the layers whose forward is running, innermost last."""
    active: list[str] = []
    hooks = []

    def leave(*_: Any) -> None:
        active.pop()

    for name, module in model.named_modules():
        hooks.append(
            module.register_forward_pre_hook(
                lambda *_, name=name: active.append(name), prepend=True
            )
        )
        hooks.append(module.register_forward_hook(leave))
    try:
        yield active
    finally:
        for hook in hooks:
            hook.remove()


def _layer_of(error: BaseException | None) -> str:
    """Return the layer of the graph node in the exporter's local variables, or ""."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            node = trace.tb_frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node) and node.meta.get("nn_module_stack"):
                return str(list(node.meta["nn_module_stack"].values())[-1][0])
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return ""


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    cause = f"{type(error).__name__}{': ' + lines[0][:300] if lines else ''}"
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            "its forward goes different ways for different values, as torchvision's detectors do, "
            f"and a graph has one way for all; keep such code outside of the network ({cause})"
        )
    if "Constraints violated (batch)" in cause:
        return (
            "its forward works for this number of samples alone; write x.shape[0] in place of "
            f"len(x) or of a number ({cause})"
        )
    return cause


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide the exporter's warnings and logs, which are about its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
