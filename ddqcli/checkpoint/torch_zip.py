"""Locate the tensors in a `torch.save` file without PyTorch, whose import costs time and memory.

Understands only what state dicts are made of. Returns None for any other file, and leaves it to
`ddqcli.checkpoint.read` to read it or to explain what is wrong with it.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddqcli.checkpoint.state_keys import find_state

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_ITEM_SIZES = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}


@dataclass(frozen=True)
class TensorLocation:
    """Position of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, not negative
    start: int  # first byte in the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]


def locate_state_dict(path: Path) -> tuple[dict[str, TensorLocation], str] | None:
    """Return the locations of a state dict's tensors by name, and where in the file it was found.

    None if the file holds anything unusual or is damaged.
    """
    state, position = find_state(load_structure(path), _holds_weights)
    entries = state if isinstance(state, Mapping) else {}
    locations = {name: v for name, v in entries.items() if isinstance(v, TensorLocation)}
    if not locations or len(locations) != len(entries):
        return None
    if not all(isinstance(name, str) for name in locations):
        return None
    return locations, f"state dict {position}"


def load_structure(path: Path) -> Any:
    """Return the content of a `torch.save` file with a TensorLocation in place of each tensor.

    None if the file holds anything unusual or is damaged.
    """
    try:
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {info.filename: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                return None  # torch.save compresses nothing; a zip bomb would
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                return None  # records that overlap
            if archive.testzip() is not None:
                return None  # a checksum differs; torch writes them but does not check them
            root = next(
                name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")
            )
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in records else b"little"
            if order != b"little":
                return None
            with archive.open(f"{root}data.pkl") as pickled:
                return _Unpickler(pickled, records, f"{root}data/", file).load()
    except Exception:  # whatever a damaged or hostile file leads to
        return None


def read_tensor(path: Path, location: TensorLocation) -> NDArray[Any]:
    """Return a contiguous tensor of a dtype that numpy knows, in its shape."""
    dtype = np.dtype(location.dtype).newbyteorder("<")
    count = math.prod(location.shape)
    return np.fromfile(path, dtype, count, offset=location.start).reshape(location.shape)


def _holds_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(item, TensorLocation) for item in value.values()
    )


class _Unpickler(pickle._Unpickler):
    """Build tensors' locations and plain containers; refuse any other name, so no code runs.

    The unpickler in Python keeps its memo in a dict. The one in C keeps it in an array, so that
    five bytes with a large index make it take gigabytes.
    """

    def __init__(
        self, pickled: Any, records: dict[str, zipfile.ZipInfo], folder: str, file: BinaryIO
    ) -> None:
        super().__init__(pickled)
        self._records, self._folder, self._file = records, folder, file

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: self._tensor(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, int, int]:
        """Return a storage's dtype, first byte in the file, and number of elements."""
        kind, dtype, key, _, numel = pid
        info = self._records[self._folder + key]
        if kind != "storage" or info.file_size != numel * _ITEM_SIZES[dtype]:
            raise ValueError(pid)
        self._file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", self._file.read(30))
        return dtype, info.header_offset + 30 + name_length + extra_length, numel

    @staticmethod
    def _tensor(
        storage: tuple[str, int, int], offset: int, shape: Any, strides: Any
    ) -> TensorLocation:
        """Return the location of a view of a storage. Raises ValueError if it reaches beyond."""
        dtype, start, numel = storage
        shape, strides = tuple(shape), tuple(strides)
        location = TensorLocation(dtype, shape, strides, start + offset * _ITEM_SIZES[dtype])
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ValueError(location)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and (last >= numel or math.prod(shape) > numel):
            raise ValueError(location)  # beyond the storage, or a value that claims to be many
        return location
