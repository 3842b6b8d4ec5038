"""LiteRT: an int8 graph as a .tflite file; its inputs and outputs are int8 too, where they can."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.errors import UsageError, VerificationError
from ddqcli.pt2e.graph import Int8Model
from ddqcli.pt2e.integers import Symmetric
from ddqcli.pt2e.quiet import quiet
from ddqcli.pt2e.runtime import Int8Runtime, OneAnswer, conversion_error, layouts

Array = NDArray[Any]
_REQUIRED = {"litert_torch": "litert-torch", "ai_edge_litert": "ai-edge-litert"}


def require_litert() -> None:
    """Raise UsageError unless the extra `ddqcli[litert]` is installed."""
    missing = [package for name, package in _REQUIRED.items() if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"LiteRT needs {', '.join(missing)}; run pip install 'ddqcli[litert]'.")


def _convert(model: Int8Model) -> bytes:
    with quiet():
        import litert_torch
        from litert_torch.quantize import pt2e_quantizer
        from litert_torch.quantize.quant_config import QuantConfig

        # Without it, the converter keeps float weights and operators between all quantizers.
        quantizer = pt2e_quantizer.PT2EQuantizer().set_global(
            pt2e_quantizer.get_symmetric_quantization_config()
        )
        try:
            converted = litert_torch.convert(
                model.module, model.example, quant_config=QuantConfig(pt2e_quantizer=quantizer)
            )
            return bytes(converted._exporter.to_bytes())
        except Exception as error:
            raise conversion_error("litert-torch", error) from error


def _missing(raw: bytes, weights: Mapping[str, Symmetric]) -> list[str]:
    """Compare integers and scales with the file's constants."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(bytearray(raw))
    stored = set()
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        for tensor in (graph.Tensors(k) for k in range(graph.TensorsLength())):
            data = model.Buffers(tensor.Buffer()).DataAsNumpy()
            if tensor.Quantization() is not None and isinstance(data, np.ndarray):
                scale = np.asarray(tensor.Quantization().ScaleAsNumpy(), np.float32)
                stored.add((data.tobytes(), scale.tobytes()))
    return [
        name
        for name, weight in weights.items()
        if not any(
            (integers.tobytes(), weight.scale.tobytes()) in stored
            for integers in layouts(weight.integers)
        )
    ]


def _open(file: Path) -> OneAnswer:
    with quiet():
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_content=file.read_bytes())
            runner = interpreter.get_signature_runner()
        except Exception as error:
            raise VerificationError(f"LiteRT cannot load {file}: {error}") from error
    inputs = sorted(runner.get_input_details().items(), key=_number)
    outputs = sorted(runner.get_output_details().items(), key=_number)

    def answer(arrays: Sequence[Array]) -> Sequence[Array]:
        feed = {name: _encoded(x, detail) for (name, detail), x in zip(inputs, arrays, strict=True)}
        with quiet():
            found = runner(**feed)
        return [_decoded(found[name], detail) for name, detail in outputs]

    return answer


def _number(item: tuple[str, Any]) -> int:
    """Return the place of an input or output, which ends its name: args_0, output_1."""
    digits = re.search(r"\d+$", item[0])
    return int(digits[0]) if digits else 0


def _encoded(x: Array, detail: Mapping[str, Any]) -> Array:
    scale, zero_point = detail["quantization"]
    if detail["dtype"] is not np.int8:
        return np.asarray(x, detail["dtype"])
    codes = np.rint(x / np.float32(scale)) + zero_point
    return np.asarray(np.clip(codes, -128, 127), np.int8)


def _decoded(x: Array, detail: Mapping[str, Any]) -> Array:
    scale, zero_point = detail["quantization"]
    if x.dtype != np.int8:
        return x.copy()
    return np.asarray((x.astype(np.float32) - zero_point) * scale, np.float32)


_TAKES = "one sample a call; what is quantized is int8, its scale and zero point in the file"
LITERT = Int8Runtime("LiteRT", "tflite", _TAKES, require_litert, _convert, _missing, _open)
