"""Kernels as PyTorch operators `ddq::...`: Triton's on CUDA, those in C on a CPU.

Operators, so that eager mode, torch.compile and CUDA graphs all take them. Where a kernel cannot be
compiled or launched, PyTorch's own operations serve instead; of Triton's, one warning says so.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddqcli.quant import cpu_launch

T = TypeVar("T")

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**31 - 2**22  # values of a tensor: offsets are 32 bits wide, and may step a little over
_failed = False

# The interpreter runs the kernels on any device. Triton asks when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_SCHEMAS = {
    "quantize": "(Tensor x, Tensor starts, int longest, Tensor nearest_value, "
    "Tensor half_step, Tensor zero_cell) -> Tensor",
    "straight_through": "(Tensor grad, Tensor x, Tensor starts, int longest, Tensor values) "
    "-> Tensor",
    "level_gradients": "(Tensor grad, Tensor x, Tensor starts, int longest, Tensor values, "
    "Tensor nearest_value, Tensor bin, Tensor half_step, Tensor zero_cell, Tensor? correction, "
    "bool learned_gates) -> (Tensor, Tensor, Tensor)",
    "uniform_quantize": "(Tensor x, Tensor scale, int low, int high) -> Tensor",
    "uniform_gradients": "(Tensor grad, Tensor x, Tensor scale, int low, int high) "
    "-> (Tensor, Tensor)",
}


@cache
def installed() -> bool:
    """True if Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _triton_takes(*tensors: Tensor) -> bool:
    """True if Triton's kernels take these tensors."""
    return (
        (INTERPRETED or all(x.is_cuda for x in tensors))
        and all(x.dtype in _TYPES and 0 < x.numel() <= _MOST for x in tensors)
        and installed()
    )


def preferred(
    by_operator: Callable[[], T], by_torch: Callable[[], T], use_compiled: bool, *tensors: Tensor
) -> T:
    """Return `by_operator()` if there are kernels for these tensors of one type, or `by_torch()`.

    On a CPU there are if `use_compiled`, and if a compiler is found. If a kernel of Triton's cannot
    be compiled or launched, this warns once, and uses PyTorch from then on.
    """
    global _failed
    if _failed:
        return by_torch()
    if use_compiled and not INTERPRETED and cpu_launch.takes(*tensors):
        return by_operator()
    if not _triton_takes(*tensors):
        return by_torch()
    try:
        return by_operator()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton raises for a card or a compiler
        _failed = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warnings.warn(
            f"Triton's kernels do not run here, and training is slower: {reason}", stacklevel=2
        )
    return by_torch()


# ---- shapes, for torch.compile


def _like_x(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _level_gradients_shapes(
    grad: Tensor, x: Tensor, starts: Tensor, longest: int, values: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    learned_gates = others[-1]
    for_gates = torch.empty_like(values) if learned_gates else values.new_empty(0)
    return torch.empty_like(grad), torch.empty_like(values), for_gates


def _uniform_gradients_shapes(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), grad.new_empty((), dtype=torch.float32)


_SHAPES: dict[str, Callable[..., Any]] = {
    "quantize": _like_x,
    "straight_through": _like_x,
    "level_gradients": _level_gradients_shapes,
    "uniform_quantize": _like_x,
    "uniform_gradients": _uniform_gradients_shapes,
}


def _by_triton(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from ddqcli.quant import triton_launch

        # Triton launches on the current device.
        with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
            return getattr(triton_launch, name)(*args)

    return call


def _register() -> torch.library.Library:
    library = torch.library.Library("ddq", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)  # type: ignore[no-untyped-call]
        on_cpu = _by_triton(name) if INTERPRETED else getattr(cpu_launch, name)
        library.impl(name, _by_triton(name), "CUDA")  # type: ignore[no-untyped-call]
        library.impl(name, on_cpu, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"ddq::{name}", _SHAPES[name], lib=library)
    return library


_library = _register()  # operators are gone when it is
