"""torch.compile for element-wise kernels: one pass over memory instead of one per operation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for all shapes."""
    compiled = torch.compile(function, dynamic=True)

    def call(*args: Any) -> Any:
        # Detached, because torch.compile specializes on requires_grad.
        return compiled(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    return call


def maybe_compiled(
    function: Callable[..., Any], device: torch.device, use_compiled: bool
) -> Callable[..., Any]:
    """Return `function` itself, or compiled if it is for the CPU."""
    return compiled(function) if use_compiled and device.type == "cpu" else function


def can_compile(device: torch.device) -> bool:
    """True if torch.compile works here. A missing compiler only shows in use, so this compiles.

    On CUDA it is of no use: it needs Triton, and with Triton `triton_ops` runs.
    """
    if device.type != "cpu":
        return False
    # torch.utils.cpp_extension warns where CUDA is installed but absent.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        compiled(_probe)(torch.zeros(8))
    except Exception:  # whatever a missing or broken compiler raises: the eager path works anyway
        return False
    return True


def _probe(x: Tensor) -> Tensor:
    return (x / 3).floor()
