"""torch.compile for element-wise kernels: one pass over memory instead of one per operation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Triton's own division is off by up to two units in the last place.
_CUDA_OPTIONS = {"eager_numerics.division_rounding": True}


@cache
def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Return `function` compiled for all shapes."""
    options: Any = None if device_type == "cpu" else _CUDA_OPTIONS
    compiled = torch.compile(function, dynamic=True, options=options)

    def call(*args: Any) -> Any:
        # Detached, because torch.compile specializes on requires_grad.
        return compiled(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    return call


def maybe_compiled(
    function: Callable[..., Any], device: torch.device, use_compiled: bool
) -> Callable[..., Any]:
    """Return `function` itself, or compiled for the device."""
    return compiled(function, device.type) if use_compiled else function


def can_compile(device: torch.device) -> bool:
    """True if torch.compile works here. A missing compiler only shows in use, so this compiles."""
    # torch.utils.cpp_extension warns where CUDA is installed but absent.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        compiled(_probe, device.type)(torch.zeros(8, device=device))
    except Exception:  # whatever a missing or broken compiler raises: the eager path works anyway
        return False
    return True


def _probe(x: Tensor) -> Tensor:
    return (x / 3).floor()
