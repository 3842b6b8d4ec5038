"""The tensors of a checkpoint, read one after the other so that memory stays bounded.

Safetensors files and `torch.save`'s state dicts are read without PyTorch; other files through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddqcli.artifact.decoder import HEAD
from ddqcli.checkpoint.chunks import (
    FLOAT_FORMATS,
    Chunk,
    contiguous_chunks,
    located_chunks,
    torch_chunks,
)
from ddqcli.checkpoint.safetensors_header import is_safetensors, read_safetensors_header
from ddqcli.checkpoint.state_keys import bare_names
from ddqcli.checkpoint.torch_zip import TensorLocation, locate_state_dict
from ddqcli.errors import CheckpointError
from ddqcli.recipe.missing_file import CHECKPOINTS, missing_file

if TYPE_CHECKING:
    import torch

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that is still in its file. `chunks()` reads it from the start at each call."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # as stored
    floating: bool
    chunks: Callable[[], Iterator[Chunk]]  # flat float32 arrays of up to CHUNK_VALUES values
    same_as: str | None = None  # name of the earlier tensor that shares this one's memory

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def open_tensors(path: Path, *, pickle: bool = False) -> tuple[list[CheckpointTensor], str]:
    """Return the tensors in the checkpoint `path`, and one line on where they were found.

    `pickle` allows a pickled module, whose code then runs. Raises CheckpointError.
    """
    if is_safetensors(path, _head(path)):
        tensors, note = _safetensors_tensors(path), "safetensors"
    elif state := locate_state_dict(path):
        tensors, note = tensors_at(path, state[0]), state[1]
    else:
        from ddqcli.checkpoint.read import load_checkpoint

        checkpoint = load_checkpoint(path, pickle=pickle)
        return _torch_tensors(checkpoint.tensors), checkpoint.note
    try:
        bare, stripped = bare_names([tensor.name for tensor in tensors])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; save the state_dict() of one model.") from error
    renamed = [
        replace(t, name=bare[t.name], same_as=t.same_as and bare[t.same_as]) for t in tensors
    ]
    return renamed, note + stripped


def is_artifact(path: Path) -> bool:
    """True if `path` is a file of `ddq export`, which holds no float weights."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(8 + len(HEAD))[8:] == HEAD
    except OSError:
        return False


def tensors_at(path: Path, locations: Mapping[str, TensorLocation]) -> list[CheckpointTensor]:
    """Return the tensors at these locations of a `torch.save` file."""
    name_at: dict[TensorLocation, str] = {}
    tensors = []
    for name, location in locations.items():
        first_name = name_at.setdefault(location, name) if math.prod(location.shape) else name
        tensors.append(
            CheckpointTensor(
                name=name,
                shape=location.shape,
                dtype=location.dtype,
                bytes=location.bytes,
                floating=location.dtype in FLOAT_FORMATS,
                chunks=partial(located_chunks, path, location),
                same_as=first_name if first_name != name else None,
            )
        )
    return tensors


def _head(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"Cannot read {path}: it is no regular file.")
    try:
        with path.open("rb") as file:
            return file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(missing_file(path, suffixes=CHECKPOINTS)) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def _safetensors_tensors(path: Path) -> list[CheckpointTensor]:
    tensors = []
    for entry in read_safetensors_header(path):
        dtype = _SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype)
        floating, size = entry.dtype.startswith(("F", "BF")), math.prod(entry.shape)
        if floating and dtype not in FLOAT_FORMATS:
            raise CheckpointError(
                f"{path}: {entry.name} is stored as {entry.dtype}; save it in float32, float16 or "
                "bfloat16."
            )
        if floating and entry.bytes != size * np.dtype(FLOAT_FORMATS[dtype]).itemsize:
            raise CheckpointError(
                f"Cannot read {path}: {entry.name} has {entry.bytes} bytes for {entry.shape}; save "
                "it again."
            )
        read = partial(contiguous_chunks, path, entry.start, size, dtype)
        tensors.append(
            CheckpointTensor(entry.name, entry.shape, dtype, entry.bytes, floating, read)
        )
    return tensors


def _torch_tensors(tensors: dict[str, torch.Tensor]) -> list[CheckpointTensor]:
    name_at: dict[tuple[Any, ...], str] = {}
    result = []
    for name, tensor in tensors.items():
        storage, offset = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        location = storage, offset, tuple(tensor.shape), tensor.stride()
        first_name = name_at.setdefault(location, name) if tensor.numel() else name
        result.append(
            CheckpointTensor(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                bytes=tensor.numel() * tensor.element_size(),
                floating=tensor.is_floating_point(),
                chunks=partial(torch_chunks, tensor),
                same_as=first_name if first_name != name else None,
            )
        )
    return result
