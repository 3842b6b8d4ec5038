"""The tensors of a checkpoint as flat float32 pieces, read one after the other so that memory stays bounded.

A safetensors file is read with numpy alone; anything else goes through PyTorch, which maps it from the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Piece = NDArray[np.float32]

PIECE = 1 << 20  # values in memory at a time
MAX_HEADER = 100_000_000  # bytes; the limit safetensors itself sets

_READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and torch.compile


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that still lies in its file. `pieces()` reads its values from the first, each time it is called."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # as stored
    floating: bool
    pieces: Callable[[], Iterator[Piece]]  # flat, up to PIECE values each
    same_as: str | None = None  # the earlier tensor whose memory this one shares

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def stored_tensors(path: Path, *, pickle: bool = False) -> tuple[list[StoredTensor], str]:
    """The tensors in the checkpoint `path` and one line on how they were found. Raises CheckpointError."""
    if is_safetensors(path):
        return _safetensors(path), "safetensors"
    from ddqcli.engine.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path, pickle=pickle)
    return _torch_tensors(checkpoint.tensors), checkpoint.note


def is_safetensors(path: Path) -> bool:
    """Whether `path` is to be read as a safetensors file: by its name, or because its header starts as one."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def _safetensors(path: Path) -> list[StoredTensor]:
    header, start = _header(path)
    room = path.stat().st_size - start
    prefix = ""
    while step := next((s for s in _WRAPPERS if header and all(n.startswith(prefix + s) for n in header)), ""):
        prefix += step
    found = []
    for name in sorted(header, key=_numbers_in_order):
        (first, last), shape, code = header[name]["data_offsets"], tuple(header[name]["shape"]), header[name]["dtype"]
        if not first <= last <= room:
            size = f"{start + room} of {start + last} bytes"
            raise CheckpointError(f"Cannot read {path}: it ends after {size}; download it again.")
        dtype, floating = np.dtype(_READABLE.get(code, "u1")), code.startswith(("F", "BF"))
        if floating and code not in _READABLE:
            raise CheckpointError(f"{path}: {name} is stored as {code}; save it in float32, float16 or bfloat16.")
        if floating and last - first != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"Cannot read {path}: {name} has {last - first} bytes for {shape}; save it again.")
        read = partial(_read_pieces, path, start + first, math.prod(shape), dtype)
        dtype_name = _NAMES.get(code, code)
        found.append(StoredTensor(name.removeprefix(prefix), shape, dtype_name, last - first, floating, read))
    return found


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer2 before layer10: safetensors files are written in the order of the alphabet."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors header by name, and where the tensors' bytes start."""
    damaged = f"Cannot read {path}: it is no whole safetensors file; download or save it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise CheckpointError(damaged)
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for entry in header.values():
            first, last = entry["data_offsets"]
            whole = [first, last, *entry["shape"]]
            if not all(type(n) is int and n >= 0 for n in whole) or not isinstance(entry["dtype"], str):
                raise TypeError(entry)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    return header, 8 + length


def _read_pieces(path: Path, start: int, size: int, dtype: np.dtype[Any]) -> Iterator[Piece]:
    # Read, not mapped: the pages of a map count as this process's memory for as long as it lives.
    with path.open("rb") as file:
        file.seek(start)
        for done in range(0, size, PIECE):
            raw = np.fromfile(file, dtype, min(PIECE, size - done))
            if dtype == np.dtype("<u2"):  # bfloat16 is the upper half of a float32
                yield (raw.astype(np.uint32) << 16).view(np.float32)
            else:
                with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused by name
                    yield raw.astype(np.float32, copy=False)


def _torch_tensors(tensors: dict[str, torch.Tensor]) -> list[StoredTensor]:
    first: dict[tuple[Any, ...], str] = {}
    found = []
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        earlier = first.setdefault(place, name) if tensor.numel() else name
        dtype, nbytes = str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()
        shared = earlier if earlier != name else None
        floating = tensor.is_floating_point()
        read = partial(_torch_pieces, tensor)
        found.append(StoredTensor(name, tuple(tensor.shape), dtype, nbytes, floating, read, shared))
    return found


def _torch_pieces(tensor: torch.Tensor) -> Iterator[Piece]:
    flat = tensor.reshape(-1)
    for done in range(0, flat.numel(), PIECE):
        yield flat[done : done + PIECE].float().numpy()
