"""The tensors of a checkpoint as flat float32 pieces, read one after the other so that memory stays bounded.

Safetensors files and state dicts of torch.save are read with numpy alone; whatever else there is goes through PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact.decoder import HEAD
from ddqcli.checkpoint.torch_zip import ITEMSIZE, TensorLocation, locate_tensors
from ddqcli.errors import CheckpointError
from ddqcli.formatting import natural_sort_key

if TYPE_CHECKING:
    import torch

Piece = NDArray[np.float32]

PIECE = 1 << 20  # values in memory at a time
MAX_HEADER = 100_000_000  # bytes; the limit safetensors itself sets

_FLOATS = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
}  # numpy has no bfloat16
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and torch.compile


@dataclass(frozen=True)
class CheckpointTensor:
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


def open_tensors(path: Path, *, pickle: bool = False) -> tuple[list[CheckpointTensor], str]:
    """The tensors in the checkpoint `path` and one line on how they were found. Raises CheckpointError."""
    if is_safetensors(path):
        tensors, note = _safetensors(path), "safetensors"
    elif found := locate_tensors(path):
        tensors, note = tensors_at(path, found[0]), found[1]
    else:
        from ddqcli.checkpoint.read import load_checkpoint

        checkpoint = load_checkpoint(path, pickle=pickle)
        return _torch_tensors(checkpoint.tensors), checkpoint.note
    prefix = ""
    while step := next(
        (w for w in WRAPPERS if tensors and all(t.name.startswith(prefix + w) for t in tensors)), ""
    ):
        prefix += step
    if prefix:
        bare = {t.name: t.name.removeprefix(prefix) for t in tensors}
        tensors = [
            replace(t, name=bare[t.name], same_as=t.same_as and bare[t.same_as]) for t in tensors
        ]
    return tensors, note + (f", prefix '{prefix}' stripped" if prefix else "")


def is_safetensors(path: Path) -> bool:
    """Whether `path` is to be read as a safetensors file: by its name, or because its header starts as one."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def is_artifact(path: Path) -> bool:
    """Whether `path` is a file of `ddq export`, which holds no float weights."""
    try:
        with path.open("rb") as file:
            return file.read(8 + len(HEAD))[8:] == HEAD
    except OSError:
        return False


def _safetensors(path: Path) -> list[CheckpointTensor]:
    header, start = _header(path)
    room = path.stat().st_size - start
    found = []
    for name in sorted(
        header, key=natural_sort_key
    ):  # they are written in the order of the alphabet
        (first, last), shape, code = (
            header[name]["data_offsets"],
            tuple(header[name]["shape"]),
            header[name]["dtype"],
        )
        dtype, floating = _NAMES.get(code, code), code.startswith(("F", "BF"))
        if not first <= last <= room:
            size = f"{start + room} of {start + last} bytes"
            raise CheckpointError(f"Cannot read {path}: it ends after {size}; download it again.")
        if floating and dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {name} is stored as {code}; save it in float32, float16 or bfloat16."
            )
        if floating and last - first != math.prod(shape) * np.dtype(_FLOATS[dtype]).itemsize:
            raise CheckpointError(
                f"Cannot read {path}: {name} has {last - first} bytes for {shape}; save it again."
            )
        read = partial(_read_pieces, path, start + first, math.prod(shape), dtype)
        found.append(CheckpointTensor(name, shape, dtype, last - first, floating, read))
    return found


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
        metadata = header.pop("__metadata__", None) or {}
        for entry in header.values():
            first, last = entry["data_offsets"]
            whole = [first, last, *entry["shape"]]
            if not all(type(n) is int and n >= 0 for n in whole) or not isinstance(
                entry["dtype"], str
            ):
                raise TypeError(entry)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    if metadata.get("format") == "ddq":
        raise CheckpointError(
            f"{path} is an exported artifact, which has no float weights; see ddq report {path}."
        )
    return header, 8 + length


def _read_pieces(path: Path, start: int, size: int, dtype: str) -> Iterator[Piece]:
    # Read, not mapped: the pages of a map count as this process's memory for as long as it lives.
    with path.open("rb") as file:
        file.seek(start)
        for done in range(0, size, PIECE):
            yield _as_float32(np.fromfile(file, _FLOATS[dtype], min(PIECE, size - done)), dtype)


def _as_float32(raw: NDArray[Any], dtype: str) -> Piece:
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused by name
        return raw.astype(np.float32, copy=False)


def tensors_at(path: Path, places: Mapping[str, TensorLocation]) -> list[CheckpointTensor]:
    """The tensors that lie at these places of a file of torch.save."""
    first: dict[TensorLocation, str] = {}
    found = []
    for name, place in places.items():
        size = math.prod(place.shape)
        earlier = first.setdefault(place, name) if size else name
        read = partial(_place_pieces, path, place)
        nbytes, shared = size * ITEMSIZE.get(place.dtype, 1), earlier if earlier != name else None
        found.append(
            CheckpointTensor(
                name, place.shape, place.dtype, nbytes, place.dtype in _FLOATS, read, shared
            )
        )
    return found


def _place_pieces(path: Path, place: TensorLocation) -> Iterator[Piece]:
    """The values in the order of the tensor's axes; one that does not lie in that order is read whole."""
    size = math.prod(place.shape)
    contiguous = np.cumprod([1, *place.shape[:0:-1]])[::-1]
    if all(
        n == 1 or step == dense
        for n, step, dense in zip(place.shape, place.strides, contiguous, strict=False)
    ):
        yield from _read_pieces(path, place.start, size, place.dtype)
        return
    reach = 1 + sum((n - 1) * step for n, step in zip(place.shape, place.strides, strict=True))
    raw = np.fromfile(path, _FLOATS[place.dtype], reach, offset=place.start)
    byte_strides = [step * raw.itemsize for step in place.strides]
    flat = np.lib.stride_tricks.as_strided(raw, place.shape, byte_strides).reshape(-1)
    for done in range(0, size, PIECE):
        yield _as_float32(flat[done : done + PIECE], place.dtype)


def _torch_tensors(tensors: dict[str, torch.Tensor]) -> list[CheckpointTensor]:
    first: dict[tuple[Any, ...], str] = {}
    found = []
    for name, tensor in tensors.items():
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        earlier = first.setdefault(place, name) if tensor.numel() else name
        dtype, nbytes = (
            str(tensor.dtype).removeprefix("torch."),
            tensor.numel() * tensor.element_size(),
        )
        shared = earlier if earlier != name else None
        floating = tensor.is_floating_point()
        read = partial(_torch_pieces, tensor)
        found.append(
            CheckpointTensor(name, tuple(tensor.shape), dtype, nbytes, floating, read, shared)
        )
    return found


def _torch_pieces(tensor: torch.Tensor) -> Iterator[Piece]:
    flat = tensor.reshape(-1)
    for done in range(0, flat.numel(), PIECE):
        yield flat[done : done + PIECE].float().numpy()
