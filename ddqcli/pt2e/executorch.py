"""ExecuTorch: an int8 graph as a .pte file whose layers XNNPACK runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ddqcli.errors import UsageError, VerificationError
from ddqcli.pt2e.graph import Int8Model, plain_strides
from ddqcli.pt2e.grids import decomposed
from ddqcli.pt2e.integers import Symmetric
from ddqcli.pt2e.quiet import quiet
from ddqcli.pt2e.runtime import Int8Runtime, OneAnswer, conversion_error, layouts
from ddqcli.qat.network_copy import copy_network

Array = NDArray[Any]


def require_executorch() -> None:
    """Raise UsageError unless the extra `ddqcli[executorch]` is installed."""
    if importlib.util.find_spec("executorch") is None:
        raise UsageError(
            "ExecuTorch needs the package executorch; run pip install 'ddqcli[executorch]'."
        )


def _convert(model: Int8Model) -> bytes:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            program = torch.export.export(_with_int8_constants(model), model.example)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)
        except Exception as error:
            raise conversion_error("ExecuTorch", error) from error


def _with_int8_constants(model: Int8Model) -> torch.fx.GraphModule:
    """Return the graph with int8 constants in place of quantized float ones."""
    module = copy_network(model.module)
    assert isinstance(module, torch.fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.target is decomposed.quantize_per_channel.default:
            constants = [module.get_buffer(str(value.target)) for value in node.args[:3]]
            codes = node.target(*constants, *node.args[3:])
            module.register_buffer(str(node.args[0].target), codes)
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


def _missing(raw: bytes, weights: Mapping[str, Symmetric]) -> list[str]:
    return [
        name
        for name, weight in weights.items()
        if not any(stored.tobytes() in raw for stored in layouts(weight.integers))
    ]


def _open(file: Path) -> OneAnswer:
    with quiet():
        from executorch.runtime import Runtime

        try:
            program = Runtime.get().load_program(file.read_bytes())
            loaded = program, program.load_method("forward")  # which dies with its program
        except Exception as error:
            raise VerificationError(f"ExecuTorch cannot load {file}: {error}") from error

    def answer(inputs: Sequence[Array]) -> Sequence[Array]:
        with quiet():
            outputs = loaded[1].execute([plain_strides(torch.from_numpy(x)) for x in inputs])
        return [output.numpy().copy() for output in outputs]

    return answer


_TAKES = "one sample a call, in float32; XNNPACK quantizes it"
EXECUTORCH = Int8Runtime("ExecuTorch", "pte", _TAKES, require_executorch, _convert, _missing, _open)
