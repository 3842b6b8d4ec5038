"""Decode a ddq file with numpy alone. Copy this file anywhere, or port it with FORMAT.md.

`tensors, info = decode("model.safetensors")` returns {name: array}. `info["activations"]` holds the
level values of layers' inputs, `info["meta"]` what the writer noted about the model.
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
HEAD = b'{"__metadata__":{"format":"ddq","sha256":"'  # byte 8 of every ddq file; 64 digits follow
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has none: its bits, under its name
DTYPES: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16, "BOOL": "?"}
DTYPES |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
BYTES = np.arange(256, dtype=np.uint8)
MAX_MANIFEST = 1 << 24  # bytes of JSON; a network of 10,000 tensors needs a megabyte
MAX_CONSTANT = 1 << 24  # values of all constants together, since a few bytes stand for them
CHUNK = 1 << 16  # values decoded at a time, so that intermediate results stay in the cache
ROW = 1 << 12  # values in a row of a chunk


class ArtifactError(ValueError):
    """The file is damaged."""


class NotAnArtifact(ArtifactError):
    """The file is no ddq file, or one of an unknown version."""


class PackedTensor(NamedTuple):
    """A quantized tensor as it lies in the file: G groups along `axis`, or one if that is None."""

    shape: tuple[int, ...]
    axis: int | None
    bits: Array  # [G], 1..8
    scale: Array  # [G], float32 of at most 12 significant bits, so that `values` are exact
    zero_point: Array  # [G], uint8
    levels: Array  # uint8: the 2^bits of each group of fewer than 8 bits, one after another
    packed: Array  # the indices of group 0, then of group 1, ..., without padding between them


class Constant(NamedTuple):
    """A tensor of equal elements, which the manifest holds once."""

    shape: tuple[int, ...]
    value: Array  # []


def decode(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return every tensor by name, and the activations' level values and the meta.

    Raises ArtifactError if any bit of the file changed. A file that was forged to contradict itself
    raises some other error.
    """
    packed, activations, aliases, meta = read(path)
    tensors = {name: to_array(tensor) for name, tensor in packed.items()}
    tensors |= {name: tensors[target] for name, target in aliases.items()}
    tables = {
        name: values(t.levels if t.bits[0] < 8 else BYTES, t.zero_point, t.scale)
        for name, t in activations.items()
    }
    return tensors, {"activations": tables, "meta": meta}


def read(
    path: str | Path,
) -> tuple[dict[str, Any], dict[str, PackedTensor], dict[str, str], dict[str, Any]]:
    """Return tensors (Array, PackedTensor or Constant), activations, aliases and meta.

    Raises as `decode`.
    """
    raw = Path(path).read_bytes()
    if raw[8:50] != HEAD:
        if len(raw) >= 8 and HEAD.startswith(raw[8:]):
            raise ArtifactError(f"{path} is incomplete (it ends after {len(raw)} bytes)")
        raise NotAnArtifact(f"{path} is not a ddq file")
    digest = hashlib.sha256(raw[:50] + b"0" * 64)
    digest.update(memoryview(raw)[114:])
    if digest.hexdigest().encode() != raw[50:114]:
        raise ArtifactError(
            f"{path} is damaged or incomplete (its SHA-256 differs); copy or download it again"
        )
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:start]), memoryview(raw)[start:]
    if (version := header.pop("__metadata__")["version"]) not in ("1", "2"):
        raise NotAnArtifact(
            f"{path} is a ddq file of version {version}; this reader knows versions 1 and 2 only"
        )
    entries = {
        name: np.frombuffer(data[slice(*e["data_offsets"])], DTYPES[e["dtype"]])
        for name, e in header.items()
    }
    spans = sorted(e["data_offsets"] for e in header.values())
    ends = [0, *(last for _, last in spans)]
    if [first for first, _ in spans] != ends[:-1] or ends[-1] != len(data):
        raise ValueError("the entries do not follow one another")
    if wrong := [name for name, e in header.items() if e["shape"] != [entries[name].size]]:
        raise ValueError(f"{', '.join(wrong)} has another shape than its bytes")
    unpacker = bz2.BZ2Decompressor()  # a few bytes may unpack to gigabytes
    text = unpacker.decompress(entries.pop("manifest").tobytes(), MAX_MANIFEST)
    if not unpacker.eof:
        raise ValueError(f"the manifest is cut short, or has more than {MAX_MANIFEST:,} bytes")
    manifest = json.loads(text)
    if {key: type(value) for key, value in manifest.items()} != {"meta": dict, "tensors": dict}:
        raise ValueError("the manifest has other keys than meta and tensors, which are objects")
    tensors: dict[str, Any] = {}
    activations, aliases = {}, {}
    for name, leaf in sorted(_leaves(manifest["tensors"])):
        try:
            kind, *shape = leaf
            if kind == "alias":
                (aliases[name],) = shape
            elif kind == "levels":
                activations[name] = _packed_tensor(entries, [0], None)
            elif kind == "constant":
                code, value, *shape = shape
                tensors[name] = Constant(tuple(shape), np.array(value, DTYPES[code.upper()]))
            elif isinstance(kind, str):
                tensors[name] = _take(entries, kind, math.prod(shape)).reshape(shape).copy()
            else:
                tensors[name] = _packed_tensor(entries, shape, kind)
        except Exception as error:  # anything a forged file can lead to
            raise ValueError(f"{name} is {leaf!s:.60} in its manifest: {error!r:.90}") from error
    if remaining := [name for name, entry in entries.items() if len(entry)]:
        raise ValueError(f"{', '.join(remaining)}: more than the manifest names")
    constants = [tensor for tensor in tensors.values() if isinstance(tensor, Constant)]
    if sum(math.prod(tensor.shape) for tensor in constants) > MAX_CONSTANT:
        raise ValueError(f"its constants have more than {MAX_CONSTANT:,} values")
    return tensors, activations, aliases, manifest["meta"]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield the full name and the list of each leaf of the manifest."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _take(entries: dict[str, Array], entry: str, count: int) -> Array:
    """Remove and return the next `count` values of an entry; its tensors follow one another."""
    taken, entries[entry] = entries[entry][:count], entries[entry][count:]
    if len(taken) != count:
        raise ValueError(f"{entry} ends too early")
    return taken


def _packed_tensor(entries: dict[str, Array], shape: list[int], axis: int | None) -> PackedTensor:
    """Take the next record of the entry `quantized`."""
    groups = 1 if axis is None else shape[axis]
    gates, zero_point, scale = (
        _take(entries, "quantized", count) for count in (groups, groups, 4 * groups)
    )
    bits = np.array([int(gate).bit_length() for gate in gates], int)
    if not np.all(gates) or np.any((1 << bits) - 1 != gates):
        raise ValueError("gates are not open from bit 0")
    level_bytes = int(np.sum((1 << bits)[bits < 8]))  # at 8 bits the index is the level
    levels = _take(entries, "quantized", level_bytes)
    numel = math.prod(shape) // max(groups, 1)  # of a group
    packed = _take(entries, "quantized", (int(bits.sum()) * numel + 7) // 8)
    return PackedTensor(tuple(shape), axis, bits, scale.view("<f4"), zero_point, levels, packed)


def to_array(tensor: Array | PackedTensor | Constant) -> Array:
    """Return the whole tensor."""
    if isinstance(tensor, PackedTensor):
        return dequantize(tensor)
    return np.full(*tensor) if isinstance(tensor, Constant) else tensor


def values(levels: Array, zero_point: Array, scale: Array) -> Array:
    """Return (levels - zero_point) * scale in float32, which is exact."""
    out: Array = np.subtract(levels, zero_point, dtype=np.float32)
    out *= scale
    return out


def dequantize(tensor: PackedTensor) -> Array:
    """Return the float32 tensor."""
    shape, axis, groups = tensor.shape, tensor.axis or 0, len(tensor.bits)
    numel = math.prod(shape) // max(groups, 1)  # of a group
    parts, bit, level = [np.empty(0, np.float32)], 0, 0
    for bits, run in groupby(range(groups), tensor.bits.tolist().__getitem__):
        run_groups = list(run)  # neighbors of equal bit-width are decoded together
        count = numel * len(run_groups)
        packed = tensor.packed[bit // 8 : (bit + count * bits + 7) // 8]
        if bit % 8:  # shift the run's first bit to the start of a byte
            packed = packed >> bit % 8 | np.append(packed[1:], np.uint8(0)) << 8 - bit % 8
        zero_point, scale = tensor.zero_point[run_groups, None], tensor.scale[run_groups, None]
        if bits == 8:
            part = values(packed[:count].reshape(len(run_groups), numel), zero_point, scale)
        else:
            levels = tensor.levels[level : level + (len(run_groups) << bits)]
            table = values(levels.reshape(len(run_groups), -1), zero_point, scale)
            part = lookup(packed, bits, table, numel)
            level += levels.size
        parts.append(part.reshape(-1)[:count])
        bit += count * bits
    flat = parts[1] if len(parts) == 2 else np.concatenate(parts)
    if not axis:
        return flat.reshape(shape)
    groups_first = flat.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(groups_first, 0, axis))


def lookup(packed: Array, bits: int, table: Array, numel: int) -> Array:
    """Return `table` [G, 2^bits] at the packed indices, [G * numel]: `numel` indices a group.

    A single group is cut into rows of ROW indices; the last row may be longer than the group.
    """
    table, row_groups, row = table[..., None], np.arange(len(table)), numel
    if len(row_groups) == 1:
        row_groups, row = np.zeros(-(-numel // ROW), int), ROW
    # For speed, look up two indices at once, as one of twice the bits, while the table stays small.
    while bits <= 6 and row % (2 * table.shape[2]) == 0 and 8 * table.shape[2] << 2 * bits <= numel:
        pairs = np.tile(table, (1, 1 << bits, 1)), np.repeat(table, 1 << bits, axis=1)
        table, bits = np.concatenate(pairs, axis=2), 2 * bits
    width = table.shape[2]  # values a code stands for
    codes = row // width  # in a row
    out = np.empty((len(row_groups), codes, width), table.dtype)
    flat_table = table.reshape(-1, width)
    step = max(1, CHUNK // max(row, 1) // 8) * 8  # rows at a time; 8 of them fill whole bytes
    for i in range(0, len(row_groups), step):
        first = row_groups[i : i + step, None] << bits  # of each row's group in the flat table
        indices = unpack(packed[i * codes * bits // 8 :], bits, len(first) * codes)
        places = indices.reshape(len(first), codes) + first
        np.take(flat_table, places, axis=0, out=out[i : i + step], mode="clip")
    return out.reshape(-1)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Return `count` indices of `bits` bits each (1 to 8, 10, 12), least significant bit first."""
    per_word = 8 // math.gcd(bits, 8)  # indices that fill whole bytes
    step, words = bits * per_word // 8, -(-count // per_word)
    padded = np.zeros(words * step + 8, np.uint8)
    part = packed[: words * step]
    padded[: len(part)] = part
    dtype = {1: "u1", 3: "<u4"}.get(step, "<u8")
    codes: Array = np.ndarray(words, dtype, padded.data, 0, (step,)).copy()
    out = np.empty((words, per_word), np.uint8 if bits <= 8 else np.uint16)
    for place in range(per_word):
        out[:, place] = codes >> bits * place & (1 << bits) - 1
    return out.reshape(-1)[:count]
