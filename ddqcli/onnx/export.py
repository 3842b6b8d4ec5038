"""A loaded model as an ONNX file in whole numbers: weights int8, activations uint8, both with DequantizeLinear.

torch.onnx.export writes the float network with the inputs' quantizers in it; `engine.qdq` then puts the weights' levels in
the place of the float weights, in the shapes that onnxruntime runs in integer arithmetic.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.errors import UsageError
from ddqcli.quant.frozen_input import FrozenInputQuantizer
from ddqcli.quant.grid import GRID_CELLS

OPSET = 21
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise UsageError unless the extra is installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {', '.join(missing)}; run pip install 'ddqcli[onnx]'.")


def write_onnx(
    path: Path,
    model: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    example: Tensor,
    about: Mapping[str, str],
) -> None:
    """Write `model`, as `ddqcli.load` gives it, with `weights` as the file holds them; the batch size stays open.

    `example` is some samples, `about` goes into the metadata. Raises UsageError, which names the layer,
    for what ONNX cannot express.
    """
    require_onnx()
    import onnx

    from ddqcli.onnx.integer_graph import rewrite

    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in model.modules():
        if isinstance(getattr(module, "input_quantizer", None), FrozenInputQuantizer):
            module.input_quantizer = _OnnxInput(module.input_quantizer)
    two = example.cpu().contiguous()[
        [0, -1]
    ]  # of one sample the exporter would conclude that there is always one
    proto = rewrite(_exported(model, two), weights)
    onnx.helper.set_model_props(proto, dict(about))
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


class _OnnxInput(nn.Module):
    """Stands for a FixedInput while exporting: its forward becomes nodes of ONNX, the last of them DequantizeLinear."""

    observing = False

    def __init__(self, fixed: FrozenInputQuantizer) -> None:
        super().__init__()
        self.uniform, self.top = fixed.uniform, len(fixed.values) - 1
        level = (fixed.values / fixed.scale + fixed.zero_point).to(torch.uint8)
        tables = {
            "scale": fixed.scale,
            "zero_point": torch.tensor(fixed.zero_point, dtype=torch.uint8),
        }
        if not fixed.uniform:
            tables |= {
                "half_step": fixed.scale / 2,
                "offset": torch.tensor(2.0 * fixed.zero_point + 1),
            }
            tables |= {"low": torch.tensor(0.0), "high": torch.tensor(GRID_CELLS - 1.0)}
            tables |= {"level_of_cell": level[fixed.nearest.long()]}
        elif self.top < 255:
            tables |= {
                "low": torch.tensor(0, dtype=torch.uint8),
                "high": torch.tensor(self.top, dtype=torch.uint8),
            }
        for name, table in tables.items():
            self.register_buffer(name, table.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        u8, shape = torch.uint8, x.shape
        if self.uniform:
            code = _node("QuantizeLinear", x, self.scale, self.zero_point, dtype=u8, shape=shape)
            if self.top < 255:
                code = _node("Clip", code, self.low, self.high, dtype=u8, shape=shape)
        else:  # as FixedInput has it
            steps = _node("Floor", _node("Div", x, self.half_step, shape=shape), shape=shape)
            cell = _node(
                "Clip",
                _node("Add", steps, self.offset, shape=shape),
                self.low,
                self.high,
                shape=shape,
            )
            cell = _node("Cast", cell, dtype=torch.int32, shape=shape, to=6)
            code = _node("Gather", self.level_of_cell, cell, dtype=u8, shape=shape)
        return _node("DequantizeLinear", code, self.scale, self.zero_point, shape=shape)


def _node(
    op: str,
    *inputs: Tensor,
    shape: Sequence[int | torch.SymInt],
    dtype: torch.dtype = torch.float32,
    **attributes: int,
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        op, inputs, attributes, dtype=dtype, shape=shape, version=OPSET
    )
    return result


def _exported(model: nn.Module, example: Tensor) -> Any:
    """The onnx.ModelProto of torch's exporter, with float weights. Raises UsageError where that fails."""
    with _quiet(), torch.no_grad(), _layers_noted(model) as within:
        try:
            program = torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            return torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            ).model_proto
        except Exception as error:
            layer = within[-1] if within else _layer_in(error)
            where = f"of the layer {layer} " if layer else ""
            raise UsageError(
                f"The model {where}cannot be exported to ONNX: {_first_cause(error)}"
            ) from error


@contextmanager
def _layers_noted(model: nn.Module) -> Iterator[list[str]]:
    """Within: the list holds the names of the layers whose forward has begun and not ended, innermost last."""
    within: list[str] = []
    hooks = []

    def ended(*_: Any) -> None:
        within.pop()

    for name, module in model.named_modules():
        hooks.append(
            module.register_forward_pre_hook(
                lambda *_, name=name: within.append(name), prepend=True
            )
        )
        hooks.append(module.register_forward_hook(ended))
    try:
        yield within
    finally:
        for hook in hooks:
            hook.remove()


def _layer_in(error: BaseException | None) -> str:
    """The layer of the graph's node that the exporter was at, found in the local variables of its functions."""
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
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + said[0][:300] if said else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: the exporter's warnings and logs, which speak of its own code, are not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
