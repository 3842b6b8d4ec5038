"""Hooks that see or change what modules read and write at their first call in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddqcli.data.trees import Tree, call, copied, tensors


class FirstCalls:
    """Hooks for one forward pass, which `run` does; removed at the end of a `with`.

    A hook runs once, in full precision though the network may use autocast. Where a hook fails,
    nothing follows: it serves an improvement that a run can do without.
    """

    def __init__(self, model: nn.Module, x: Tree) -> None:
        self.model, self.x, self.device = model, x, tensors(x)[0].device
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> FirstCalls:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def on_input(self, layer: str, hook: Callable[[Tensor], None]) -> None:
        """Call `hook` with the layer's input, if that is one floating-point tensor."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _single_input(args, kwargs)
            if isinstance(x, Tensor) and x.is_floating_point():
                hook(x)

        module = self.model.get_submodule(layer)
        self._handles.append(module.register_forward_pre_hook(self._once(before), with_kwargs=True))

    def on_output(self, layer: str, hook: Callable[[Tensor], Tensor | None]) -> None:
        """Call `hook` with the layer's output, which becomes what it returns, unless None."""

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return hook(output)

        module = self.model.get_submodule(layer)
        self._handles.append(module.register_forward_hook(self._once(after)))

    def run(self) -> None:
        """Do the pass. It may end early: hooks rule out fast paths that a network may rely on."""
        with suppress(Exception):
            call(self.model, copied(self.x))

    def _once(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        called = False

        def guarded(*args: Any) -> Any:
            nonlocal called
            if called:
                return None
            called = True
            with suppress(Exception), torch.autocast(self.device.type, enabled=False):
                return hook(*args)

        return guarded


def _single_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a layer's input; None for attention between different tensors."""
    inputs = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    if {"query", "key", "value"} <= inputs.keys():
        query = inputs["query"]
        return query if query is inputs["key"] and query is inputs["value"] else None
    return next(iter((*args, *kwargs.values())), None)
