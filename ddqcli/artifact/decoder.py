"""Reads a ddq file; numpy and the standard library only. Copy this file anywhere, or port it: FORMAT.md explains it.

`tensors, manifest = decode("model.ddq")` gives {name: array}, and what the writer said about the model.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import math
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
HEAD = b'{"__metadata__":{"format":"ddq","sha256":"'  # every ddq file has this at byte 8, then the 64 digits
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has none: its bits, under its name
DTYPES: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16, "BOOL": "?"}
DTYPES |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
TABLES = {"gates": "u1", "indices": "u1", "levels": "u1", "scales": "<f4", "zero_points": "u1"}
CHUNK = 1 << 16  # values decoded at a time, so that what lies between stays in the cache


class ArtifactError(ValueError):
    """The file is damaged, or contradicts itself."""


class NotAnArtifact(ArtifactError):
    """The file is no ddq file, or one of a version unknown here."""


class Stored(NamedTuple):
    """A quantized tensor as stored: G groups along `axis` (one, if that is None), each with its own level vector."""

    shape: tuple[int, ...]
    axis: int | None
    bits: list[int]  # [G], 1..8
    levels: list[Array]  # [G] arrays of 2^bits, uint8
    scale: Array  # [G], float32 of at most 12 significant bits, so that the product below is exact
    zero_point: Array  # [G], uint8
    packed: Array  # the indices of group 0, then of group 1, ..., without padding between them

    def values(self, groups: list[int]) -> NDArray[np.float32]:
        """[groups, 2^bits] level values of groups of equal bits."""
        levels = np.stack([self.levels[group] for group in groups]).astype(np.float32)
        return np.asarray((levels - self.zero_point[groups, None]) * self.scale[groups, None], np.float32)


def decode(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """All tensors by name, and the manifest with its activations as {name: float32 level values [2^bits]}.

    Raises OSError where the file cannot be opened, and ArtifactError on any fault in it.
    """
    tensors, manifest = read(path)
    tensors |= {name: dequantize(tensors[name]) for name in manifest["quantized"]}
    tensors |= {name: tensors[target] for name, target in manifest["aliases"].items()}
    manifest["activations"] = {name: stored.values([0])[0] for name, stored in manifest["activations"].items()}
    return tensors, manifest


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `decode`, with quantized tensors and activations as Stored, and aliases in the manifest only."""
    raw = Path(path).read_bytes()
    if raw[8 : (start := 8 + len(HEAD))] != HEAD:
        raise NotAnArtifact(f"{path} is not a ddq file")
    digest = hashlib.sha256(raw[:start] + b"0" * 64)
    digest.update(memoryview(raw)[start + 64 :])
    if digest.hexdigest().encode() != raw[start : start + 64]:
        raise ArtifactError(f"{path} is damaged or incomplete (its SHA-256 differs); copy or download it again")
    try:
        header = json.loads(raw[8 : (end := 8 + int.from_bytes(raw[:8], "little"))])
        if (version := header.pop("__metadata__")["version"]) != "1":
            raise NotAnArtifact(f"{path} is a ddq file of version {version}; this reader knows version 1 only")
        entries = {name: _entry(raw, end, **entry) for name, entry in header.items()}
        _require(end + sum(entry.nbytes for entry in entries.values()) == len(raw), "the entries do not fill the file")
        return _contents(entries)
    except NotAnArtifact:
        raise
    except Exception as error:  # whatever a file made on purpose to mislead leads to
        raise ArtifactError(f"{path} contradicts itself ({type(error).__name__}: {error})") from error


def _entry(raw: bytes, header_end: int, data_offsets: list[int], dtype: str, shape: list[int]) -> Array:
    entry: Array = np.ndarray(tuple(shape), DTYPES[dtype], raw, header_end + data_offsets[0])
    _require(data_offsets[1] - data_offsets[0] == entry.nbytes, "an entry has not the bytes of its shape")
    return entry


def _contents(entries: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the manifest says is in the entries: tensors lie in them one after another, names ascending."""

    def take(entry: str, count: int) -> Array:
        taken, entries[entry] = entries[entry][:count], entries[entry][count:]
        _require(taken.shape == (count,), f"{entry} ends too early")
        return taken

    def stored(shape: list[int], axis: int | None) -> Stored:
        _require(axis is None or axis in range(len(shape)), f"there is no axis {axis}")
        groups = 1 if axis is None else shape[axis]
        gates, scale, zero_point = take("gates", groups), take("scales", groups), take("zero_points", groups)
        bits = [int(gate).bit_length() for gate in gates]
        _require(all(bits) and list(gates) == [2**s - 1 for s in bits], "gates are not open from bit 0")
        levels = [np.arange(256, dtype=np.uint8) if s == 8 else take("levels", 2**s) for s in bits]
        packed = take("indices", (sum(bits) * (numel(shape) // max(groups, 1)) + 7) // 8)
        return Stored(tuple(shape), axis, bits, levels, scale, zero_point, packed)

    def numel(shape: list[int]) -> int:
        _require(all(type(size) is int and size >= 0 for size in shape), f"{shape} is no shape")
        return math.prod(shape)

    _require(all(entries[name].dtype == dtype for name, dtype in TABLES.items()), "an entry's dtype is wrong")
    manifest = json.loads(bz2.decompress(entries.pop("manifest").tobytes()))
    tensors: dict[str, Any] = {}
    for name, shape in sorted(manifest["quantized"].items()):
        tensors[name] = stored(shape, manifest["axes"].get(name))
    manifest["activations"] = {name: stored([0], None) for name in sorted(manifest["activations"])}
    for dtype, shapes in manifest["kept"].items():
        for name, shape in sorted(shapes.items()):
            tensors[name] = take(dtype, numel(shape)).reshape(shape).copy()
    names = [*manifest["quantized"], *(name for shapes in manifest["kept"].values() for name in shapes)]
    _require(len(names) == len(tensors), "two tensors have one name")
    _require(tensors.keys() >= set(manifest["aliases"].values()), "an alias names no tensor")
    _require(not any(map(len, entries.values())), "the entries hold more than the manifest names")
    return tensors, manifest


def dequantize(stored: Stored) -> NDArray[np.float32]:
    """The float32 tensor, value = (level - zero_point) * scale."""
    each, bit = math.prod(stored.shape) // max(len(stored.bits), 1), 0
    pieces = [np.empty(0, np.float32)]
    for bits, run in groupby(range(len(stored.bits)), stored.bits.__getitem__):
        groups = list(run)  # neighbours of equal bits are decoded together
        count = len(groups) * each
        packed, shift = stored.packed[bit // 8 : (bit + count * bits + 7) // 8], bit % 8
        if shift:  # move the run's first bit to a byte's first
            packed = packed >> shift | np.append(packed[1:], np.uint8(0)) << (8 - shift)
        bit += count * bits
        table = stored.values(groups)
        if len(groups) == 1:
            pieces.append(unpack(packed, bits, count, table[0]))
        else:
            rows = unpack(packed, bits, count).reshape(len(groups), each)
            starts, block = np.arange(len(groups))[:, None] << bits, max(1, CHUNK // max(1, each))
            out = np.empty(rows.shape, np.float32)
            for i in range(0, len(groups), block):
                np.take(table, rows[i : i + block] + starts[i : i + block], out=out[i : i + block], mode="clip")
            pieces.append(out.reshape(-1))
    flat = pieces[1] if len(pieces) == 2 else np.concatenate(pieces)
    if not stored.axis:
        return flat.reshape(stored.shape)
    groups_first = stored.shape[stored.axis], *stored.shape[: stored.axis], *stored.shape[stored.axis + 1 :]
    return np.ascontiguousarray(np.moveaxis(flat.reshape(groups_first), 0, stored.axis))


def unpack(packed: Array, bits: int, count: int, table: Array | None = None) -> Array:
    """`count` indices of `bits` bits, least significant bit first, or the entries of `table` [2^bits] at these indices.

    For speed, `per` neighbours, together a code of at most 12 bits, are looked up at once. As 8 indices fill `bits`
    bytes, a 64-bit word read at every `bits`-th byte holds 8 of them.
    """
    if bits == 8 and table is None:
        return packed[:count]
    lookup = _indices_of_codes(bits) if table is None else table[_indices_of_codes(bits)]
    per, words = lookup.shape[1], (count + 7) // 8
    width = bits * per
    padded = np.zeros(words * bits + 8, np.uint8)
    padded[: len(packed)] = packed
    out = np.empty((words * 8 // per, per), lookup.dtype)
    for start in range(0, words, CHUNK // 8):
        stop = min(start + CHUNK // 8, words)
        if width == 8:
            codes: Array = padded[start * bits : stop * bits]
        else:
            word: Array = np.ndarray(stop - start, "<i8", padded.data, start * bits, (bits,)).copy()
            codes = np.empty((stop - start, 8 // per), np.int64)
            for place in range(8 // per):
                np.bitwise_and(word >> width * place, 2**width - 1, out=codes[:, place])
        np.take(lookup, codes.reshape(-1), axis=0, out=out[start * 8 // per : stop * 8 // per], mode="clip")
    return out.reshape(-1)[:count]


@lru_cache
def _indices_of_codes(bits: int) -> Array:
    """[2^(bits * per), per]: the indices that each code holds."""
    per = 1 << (12 // bits).bit_length() - 1  # 8, 4, 4, 2, 2, 2, 1, 1
    codes = np.arange(1 << bits * per)[:, None]
    return np.asarray(codes >> bits * np.arange(per) & (1 << bits) - 1, np.uint8)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
