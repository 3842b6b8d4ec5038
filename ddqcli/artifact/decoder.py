"""Reads a ddq file with numpy and the standard library. Copy this file anywhere, or port it: FORMAT.md explains it.

`tensors, about = decode("model.safetensors")` gives {name: array}; `about["activations"]` has the level values of layers'
inputs, `about["meta"]` what the writer said about the model.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import math
from collections.abc import Iterator
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
BYTES = np.arange(256, dtype=np.uint8)
CHUNK, ROW = (
    1 << 16,
    1 << 12,
)  # values worked on at a time, so that what lies between stays in the cache; in a row


class ArtifactError(ValueError):
    """The file is not what was written."""


class NotAnArtifact(ArtifactError):
    """The file is no ddq file, or one of a version unknown here."""


class Stored(NamedTuple):
    """A quantized tensor as it lies in the file: G groups along `axis` (one, if that is None), each with its own levels."""

    shape: tuple[int, ...]
    axis: int | None
    bits: Array  # [G], 1..8
    scale: Array  # [G], float32 of at most 12 significant bits, so that `values` are exact
    zero_point: Array  # [G], uint8
    levels: Array  # uint8: the 2^bits of each group of fewer than 8 bits, one after another
    packed: Array  # the indices of group 0, then of group 1, ..., without padding between them


def decode(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Every tensor. Raises ArtifactError if a bit of the file changed; one made to contradict itself ends in some error."""
    tensors, activations, aliases, meta = read(path)
    tensors = {name: dequantize(t) if isinstance(t, Stored) else t for name, t in tensors.items()}
    tensors |= {name: tensors[target] for name, target in aliases.items()}
    tables = {
        n: values(t.levels if t.bits[0] < 8 else BYTES, t.zero_point, t.scale)
        for n, t in activations.items()
    }
    return tensors, {"activations": tables, "meta": meta}


def read(
    path: str | Path,
) -> tuple[dict[str, Any], dict[str, Stored], dict[str, str], dict[str, Any]]:
    """(tensors: Array or Stored, activations, aliases, meta). Raises as `decode`."""
    raw = Path(path).read_bytes()
    if raw[8:50] != HEAD:
        raise NotAnArtifact(f"{path} is not a ddq file")
    digest = hashlib.sha256(raw[:50] + b"0" * 64)
    digest.update(memoryview(raw)[114:])
    if digest.hexdigest().encode() != raw[50:114]:
        raise ArtifactError(
            f"{path} is damaged or incomplete (its SHA-256 differs); copy or download it again"
        )
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:start]), memoryview(raw)[start:]
    if (version := header.pop("__metadata__")["version"]) != "1":
        raise NotAnArtifact(
            f"{path} is a ddq file of version {version}; this reader knows version 1 only"
        )
    entries = {
        name: np.frombuffer(data[slice(*e["data_offsets"])], DTYPES[e["dtype"]])
        for name, e in header.items()
    }
    manifest = json.loads(bz2.decompress(entries.pop("manifest").tobytes()))
    tensors: dict[str, Any] = {}
    activations, aliases = {}, {}
    for name, (what, *shape) in sorted(_names(manifest["tensors"])):
        if what == "alias":
            (aliases[name],) = shape
        elif what == "levels":
            activations[name] = _stored(entries, [0], None)
        elif isinstance(what, str):
            tensors[name] = _take(entries, what, math.prod(shape)).reshape(shape).copy()
        else:
            tensors[name] = _stored(entries, shape, what)
    if left := [name for name, entry in entries.items() if len(entry)]:
        raise ValueError(f"{', '.join(left)}: more than the manifest names")
    return tensors, activations, aliases, manifest["meta"]


def _names(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _names(value, f"{before}{key}.")
        else:
            yield before + key, value


def _take(entries: dict[str, Array], entry: str, count: int) -> Array:
    """The next `count` values of an entry: tensors lie in it one after another, names ascending."""
    taken, entries[entry] = entries[entry][:count], entries[entry][count:]
    if len(taken) != count:
        raise ValueError(f"{entry} ends too early")
    return taken


def _stored(entries: dict[str, Array], shape: list[int], axis: int | None) -> Stored:
    groups = 1 if axis is None else shape[axis]
    gates, zero_point, scale = (
        _take(entries, "quantized", count) for count in (groups, groups, 4 * groups)
    )
    bits = np.array([int(gate).bit_length() for gate in gates], int)
    if not np.all(gates) or np.any((1 << bits) - 1 != gates):
        raise ValueError("gates are not open from bit 0")
    levels = _take(
        entries, "quantized", int(np.sum((1 << bits)[bits < 8]))
    )  # at 8 bits the index is the level
    packed = _take(
        entries, "quantized", (int(bits.sum()) * (math.prod(shape) // max(groups, 1)) + 7) // 8
    )
    return Stored(tuple(shape), axis, bits, scale.view("<f4"), zero_point, levels, packed)


def values(levels: Array, zero_point: Array, scale: Array) -> Array:
    """float32, exact."""
    out: Array = np.subtract(levels, zero_point, dtype=np.float32)
    out *= scale
    return out


def dequantize(stored: Stored) -> Array:
    """The float32 tensor."""
    shape, axis, each = (
        stored.shape,
        stored.axis or 0,
        math.prod(stored.shape) // max(len(stored.bits), 1),
    )
    parts, bit, level = [np.empty(0, np.float32)], 0, 0
    for bits, run in groupby(range(len(stored.bits)), stored.bits.tolist().__getitem__):
        groups = list(run)  # neighbours of equal bits are decoded together
        count = each * len(groups)
        packed = stored.packed[bit // 8 : (bit + count * bits + 7) // 8]
        if bit % 8:  # move the run's first bit to a byte's first
            packed = packed >> bit % 8 | np.append(packed[1:], np.uint8(0)) << 8 - bit % 8
        zero_point, scale = stored.zero_point[groups, None], stored.scale[groups, None]
        if bits == 8:
            part = values(packed[:count].reshape(len(groups), each), zero_point, scale)
        else:
            levels = stored.levels[level : level + (len(groups) << bits)].reshape(len(groups), -1)
            part = looked_up(packed, bits, values(levels, zero_point, scale), each)
            level += levels.size
        parts.append(part.reshape(-1)[:count])
        bit += count * bits
    flat = parts[1] if len(parts) == 2 else np.concatenate(parts)
    if not axis:
        return flat.reshape(shape)
    return np.ascontiguousarray(
        np.moveaxis(flat.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]), 0, axis)
    )


def looked_up(packed: Array, bits: int, table: Array, each: int) -> Array:
    """[G * each]: what stands in a group's row of `table` [G, 2^bits] at each of its packed indices."""
    table, place, row = table[..., None], np.arange(len(table)), each
    if len(place) == 1:  # cut the group into rows, the last one too long
        place, row = np.zeros(-(-each // ROW), int), ROW
    while bits <= 6 and row % (2 * table.shape[2]) == 0 and 8 * table.shape[2] << 2 * bits <= each:
        pairs = np.tile(table, (1, 1 << bits, 1)), np.repeat(table, 1 << bits, axis=1)
        table, bits = (
            np.concatenate(pairs, axis=2),
            2 * bits,
        )  # two indices are one of twice the bits; for speed
    per = table.shape[2]
    out, flat, codes = (
        np.empty((len(place), row // per, per), table.dtype),
        table.reshape(-1, per),
        row // per,
    )
    step = max(1, CHUNK // max(row, 1) // 8) * 8  # so many rows fill whole bytes
    for i in range(0, len(place), step):
        first = place[i : i + step, None] << bits
        found = unpack(packed[i * codes * bits // 8 :], bits, len(first) * codes).reshape(
            len(first), codes
        )
        np.take(flat, found + first, axis=0, out=out[i : i + step], mode="clip")
    return out.reshape(-1)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """[count] indices of so many bits each (1 to 8, 10, 12), least significant bit first."""
    per = 8 // math.gcd(bits, 8)  # indices that fill whole bytes
    step, words = bits * per // 8, -(-count // per)
    padded = np.zeros(words * step + 8, np.uint8)
    part = packed[: words * step]
    padded[: len(part)] = part
    codes: Array = np.ndarray(
        words, {1: "u1", 3: "<u4"}.get(step, "<u8"), padded.data, 0, (step,)
    ).copy()
    out = np.empty((words, per), np.uint8 if bits <= 8 else np.uint16)
    for place in range(per):
        out[:, place] = codes >> bits * place & (1 << bits) - 1
    return out.reshape(-1)[:count]
