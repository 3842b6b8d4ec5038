"""Where the tensors of a file of torch.save lie in it, found without PyTorch, whose import takes seconds and memory.

Only what state dicts are made of is understood. For anything else there is `ddqcli.checkpoint.read`, which also knows
what to say about it, so nothing here explains itself: what is unusual is None.
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

# Where training scripts keep the weights, averaged (EMA) ones first, as ddqcli.checkpoint.read has them.
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *(
        "state_dict",
        "model_state_dict",
        "model_state",
        "model",
        "network",
        "net",
        "weights",
        "params",
    ),
)

_STORAGES = {
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
ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
}  # others: 1


@dataclass(frozen=True)
class TensorLocation:
    """A tensor's place in the file: its elements begin at byte `start`; strides are in elements, not negative."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


def locate_tensors(path: Path) -> tuple[dict[str, TensorLocation], str] | None:
    """The places of a state dict's tensors by name, and where it was found; None if the file is unusual or damaged."""
    found, keys = _unwrapped(contents(path))
    places = {name: value for name, value in found.items() if isinstance(value, TensorLocation)}
    if not places or len(places) != len(found) or not all(isinstance(name, str) for name in places):
        return None
    where = "under " + " > ".join(repr(key) for key in keys) if keys else "at the top level"
    return places, f"state dict {where}"


def contents(path: Path) -> Any:
    """What the file holds, with a Place for each tensor; None if it is unusual or damaged."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {info.filename: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                return None  # torch.save compresses nothing; a bomb would
            if archive.testzip() is not None:
                return None  # a bit of it changed; torch writes checksums but does not look at them
            root = next(
                name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")
            )
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in records else b"little"
            if order != b"little":
                return None
            with archive.open(f"{root}data.pkl") as pickled:
                return _Unpickler(pickled, records, f"{root}data/", file).load()
    except (
        Exception
    ):  # whatever a damaged or hostile file leads to: it is for the other reader to explain
        return None


def read_tensor(path: Path, place: TensorLocation) -> NDArray[Any]:
    """The values of a dense tensor of a type that numpy knows, in its shape."""
    count = math.prod(place.shape)
    return np.fromfile(
        path, np.dtype(place.dtype).newbyteorder("<"), count, offset=place.start
    ).reshape(place.shape)


def _unwrapped(content: Any) -> tuple[Mapping[str, Any], list[str]]:
    keys: list[str] = []
    while isinstance(content, Mapping) and len(keys) < 3:
        key = next((key for key in STATE_KEYS if _may_hold_weights(content.get(key))), None)
        if key is None:
            return content, keys
        content = content[key]
        keys.append(key)
    return {}, keys


def _may_hold_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(item, (TensorLocation, Mapping)) for item in value.values()
    )


class _Unpickler(pickle.Unpickler):
    """Understands tensors, parameters and plain containers; refuses every other name, so no code of the file's runs."""

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
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, int, int]:
        """dtype, first byte in the file, and number of elements of a storage."""
        kind, dtype, key, _, numel = pid
        info = self._records[self._folder + key]
        if kind != "storage" or info.file_size != numel * _itemsize(dtype):
            raise ValueError(pid)
        self._file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", self._file.read(30))
        return dtype, info.header_offset + 30 + name_length + extra_length, numel

    @staticmethod
    def _tensor(
        storage: tuple[str, int, int], offset: int, shape: Any, strides: Any
    ) -> TensorLocation:
        dtype, start, numel = storage
        place = TensorLocation(
            dtype, tuple(shape), tuple(strides), start + offset * _itemsize(dtype)
        )
        if (
            len(place.shape) != len(place.strides)
            or min((offset, *place.shape, *place.strides)) < 0
        ):
            raise ValueError(place)
        last = offset + sum(
            (n - 1) * step for n, step in zip(place.shape, place.strides, strict=True)
        )
        if math.prod(place.shape) and last >= numel:
            raise ValueError(place)
        return place


def _itemsize(dtype: str) -> int:
    return ITEMSIZE.get(dtype, 1)
