"""Why torch cannot export a network: layer, cause and remedy in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CODE = re.compile(r'File "([^"]+)", line (\d+), in')  # the network's own, as torch reports it
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def refusal(error: BaseException, active: list[str], target: str = "ONNX") -> str:
    """Return the message for an error of torch's exporter on the way to `target`.

    `active` are the layers whose forward was running, as `active_layers` provides them.
    """
    layer = active[-1] if active else _layer_of(error)
    where = f"of the layer {layer} " if layer else ""
    return f"The model {where}cannot be exported to {target}: {_reason(error)}."


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if type(error).__name__.startswith("GuardOnDataDependent"):
        line = f" ({code[-1][0]}:{code[-1][1]})" if (code := _CODE.findall(text)) else ""
        return (
            f"its forward decides by the values of a tensor{line}, and a graph has no branches; "
            "compute both ways and choose by torch.where, or give raw outputs and decide after the "
            "runtime, as recipes/README.md shows for a detector"
        )
    if "Constraints violated (batch)" in text:
        return (
            "its forward works for one batch size alone; take it from x.shape[0], not from len(x), "
            "which is a number, or write -1 in a view"
        )
    if found := _OPERATOR.search(text):
        return (
            f"ONNX has no operator {found[1]}; compute it with other operators, or export without "
            "--format onnx"
        )
    line = f"{type(error).__name__}: {text.strip()}".splitlines()[0][:300].rstrip(" .:")
    return f"{line}; torch.export must be able to trace its forward"


@contextmanager
def active_layers(model: nn.Module) -> Iterator[list[str]]:
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
