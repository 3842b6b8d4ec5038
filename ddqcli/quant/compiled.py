"""torch.compile for what goes over every value: one pass over memory instead of one an operation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Triton's own division is off by up to two units of the last place.
_ROUNDED = {"eager_numerics.division_rounding": True}


@cache
def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`function`, compiled for all shapes."""
    options: Any = None if device_type == "cpu" else _ROUNDED
    compiled = torch.compile(function, dynamic=True, options=options)

    def call(
        *args: Any,
    ) -> Any:  # detached: whether a tensor wants a gradient would make a kernel of its own
        return compiled(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    return call


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: tried once on a few values, since a missing compiler shows only then."""
    # It warns where CUDA is installed but absent.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        compiled(_probe, device.type)(torch.zeros(8, device=device))
    except (
        Exception
    ):  # whatever a missing or broken compiler raises: the eager path is always right
        return False
    return True


def _probe(x: Tensor) -> Tensor:
    return (x / 3).floor()
