"""The header of a safetensors file: names, shapes and byte positions, without PyTorch.

Layout of the file: the header's length as uint64, the header as JSON, the tensors' bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.errors import CheckpointError
from ddqcli.formatting import natural_sort_key
from ddqcli.json_text import parse_json

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of the header."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling: F32, BF16, I64, ...
    start: int  # first byte in the file
    bytes: int


def is_safetensors(path: Path, head: bytes) -> bool:
    """True if the name ends in .safetensors, or the beginning of the file, `head`, looks like it.

    `head` needs 9 bytes: after the header's length follows the `{` of its JSON.
    """
    return path.suffix == ".safetensors" or head[8:9] == b"{"


def read_safetensors_header(path: Path) -> list[SafetensorsEntry]:
    """Return the entries of `path`, layers in numeric order. Raises CheckpointError."""
    header, start = _parse_header(path)
    size = path.stat().st_size
    entries = []
    for name in sorted(header, key=natural_sort_key):  # files list them alphabetically
        first, last = header[name]["data_offsets"]
        if not first <= last <= size - start:
            raise CheckpointError(
                f"Cannot read {path}: it ends after {size} of {start + last} bytes; download it "
                "again."
            )
        shape = tuple(header[name]["shape"])
        entry = SafetensorsEntry(name, shape, header[name]["dtype"], start + first, last - first)
        entries.append(entry)
    return entries


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header's JSON by tensor name, and the position of the first tensor's bytes."""
    damaged = f"Cannot read {path}: it is no whole safetensors file; download or save it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
            raise CheckpointError(damaged)
        text = file.read(length)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise TypeError(metadata)
        for entry in header.values():
            first, last = entry["data_offsets"]
            numbers = [first, last, *entry["shape"]]
            if not all(type(n) is int and n >= 0 for n in numbers):
                raise TypeError(entry)
            if not isinstance(entry["dtype"], str):
                raise TypeError(entry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(damaged) from error
    if metadata.get("format") == "ddq":
        raise CheckpointError(
            f"{path} is an exported artifact, which has no float weights; see ddq report {path}."
        )
    return header, 8 + length
