"""Read a tensor as flat float32 chunks of bounded size; from a file with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.checkpoint.torch_zip import TensorLocation

if TYPE_CHECKING:
    import torch

Chunk = NDArray[np.float32]

CHUNK_VALUES = 1 << 20  # values in memory at a time

# Numpy has no bfloat16: its bits are read as uint16.
FLOAT_FORMATS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def contiguous_chunks(path: Path, start: int, size: int, dtype: str) -> Iterator[Chunk]:
    """Yield `size` values of `dtype` that lie in `path` from byte `start` on."""
    # Read, not memory-mapped: mapped pages count as this process's memory as long as it lives.
    with path.open("rb") as file:
        file.seek(start)
        for first in range(0, size, CHUNK_VALUES):
            count = min(CHUNK_VALUES, size - first)
            yield _as_float32(np.fromfile(file, FLOAT_FORMATS[dtype], count), dtype)


def located_chunks(path: Path, location: TensorLocation) -> Iterator[Chunk]:
    """Yield the values at `location` in row-major order.

    A tensor that is stored in another order, such as a transposed one, is read whole.
    """
    size = math.prod(location.shape)
    if _is_contiguous(location):
        yield from contiguous_chunks(path, location.start, size, location.dtype)
        return
    shape, strides = location.shape, location.strides
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    raw = np.fromfile(path, FLOAT_FORMATS[location.dtype], span, offset=location.start)
    byte_strides = [step * raw.itemsize for step in strides]
    flat = np.lib.stride_tricks.as_strided(raw, shape, byte_strides).reshape(-1)
    for first in range(0, size, CHUNK_VALUES):
        yield _as_float32(flat[first : first + CHUNK_VALUES], location.dtype)


def torch_chunks(tensor: torch.Tensor) -> Iterator[Chunk]:
    """Yield the values of a PyTorch tensor."""
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), CHUNK_VALUES):
        yield flat[first : first + CHUNK_VALUES].float().numpy()


def _is_contiguous(location: TensorLocation) -> bool:
    expected = 1
    for n, step in zip(reversed(location.shape), reversed(location.strides), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _as_float32(raw: NDArray[Any], dtype: str) -> Chunk:
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        return raw.astype(np.float32, copy=False)
