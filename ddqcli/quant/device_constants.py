"""Small tensors of Python numbers, copied to a device once: the host waits for each copy."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def device_constant(
    values: tuple[int, ...] | tuple[float, ...] | tuple[bool, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return `values` as a tensor [n], the same one each time: it must not be changed."""
    with torch.inference_mode(False):  # its results could not be saved for a backward pass
        return torch.tensor(values, device=device, dtype=dtype)
