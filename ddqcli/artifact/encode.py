"""Encode a ddq file as bytes, as FORMAT.md describes it; callers write them to disk."""

from __future__ import annotations

import bz2
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.packing import pack
from ddqcli.artifact.sizes import Sizes, measure
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor, check_aliases

Array = NDArray[Any]
VERSION = "1"
CODES = {np.dtype(dtype): code for code, dtype in decoder.DTYPES.items()}  # safetensors' dtypes


def encode_artifact(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, Array],
    aliases: Mapping[str, str],
    meta: Mapping[str, Any],
) -> tuple[bytes, Sizes]:
    """Return the bytes of a file, and where they went. Equal content in any order: equal bytes.

    Args:
        quantized: tensors as indices into level vectors.
        activations: level vectors of layers' inputs.
        floats: unquantized tensors by name, of any dtype.
        aliases: further names of shared tensors, each with the name that is stored.
        meta: JSON without NaN.

    Raises ValueError if a name occurs twice, an alias points nowhere, or a dtype cannot be stored.
    """
    records: list[QuantizedTensor | ActivationTable] = sorted(
        [*quantized, *activations], key=lambda record: record.name
    )
    _check_names([record.name for record in records], floats, aliases)
    check_aliases(aliases, {*floats, *(tensor.name for tensor in quantized)})
    leaves: dict[str, list[Any]] = {name: ["alias", target] for name, target in aliases.items()}
    parts: dict[str, list[Array]] = {"quantized": []}  # arrays of each entry
    for record in records:
        leaves[record.name] = (
            [record.axis, *record.shape] if isinstance(record, QuantizedTensor) else ["levels"]
        )
        parts["quantized"] += _record(record)
    for name, array in sorted(floats.items()):
        entry = _code(name, array).lower()
        leaves[name] = [entry, *array.shape]
        parts.setdefault(entry, []).append(array)
    manifest = bz2.compress(_canonical_json({"meta": dict(meta), "tensors": _tree(leaves)}))
    parts["manifest"] = [np.frombuffer(manifest, "u1")]
    entries = {
        entry: _concatenated(arrays, decoder.DTYPES.get(entry.upper(), "u1"))
        for entry, arrays in parts.items()
    }
    raw = _safetensors(entries)
    header = 8 + int.from_bytes(raw[:8], "little")
    return raw, measure(quantized, activations, floats, header=header, file=len(raw))


def _record(record: QuantizedTensor | ActivationTable) -> list[Array]:
    """Return the arrays of a record in the entry `quantized`."""
    if isinstance(record, QuantizedTensor):
        levels, scale, zero_point = record.levels, record.scale, record.zero_point
        packed = pack(record.rows(), record.bits)
    else:
        levels, (scale, zero_point), packed = (record.levels,), record.arrays, np.zeros(0, np.uint8)
    gates = np.array([len(level) - 1 for level in levels], np.uint8)  # 2^s - 1: s gates are open
    stored_levels = [level for level in levels if len(level) < 256]
    return [gates, zero_point, scale.astype("<f4").view("u1"), *stored_levels, packed]


def _tree(leaves: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Nest names at dots, since most begin alike; what follows a tensor's name stays whole."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        head, dot, rest = name.partition(".")
        if dot and head not in leaves:
            tree.setdefault(head, {})[rest] = leaf
        else:
            tree[name] = leaf
    return {
        name: _tree(below) if isinstance(below, dict) else below for name, below in tree.items()
    }


def _check_names(*names: Iterable[str]) -> None:
    counts = Counter(chain(*names))
    if duplicates := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(
            f"{', '.join(duplicates)}: more than one tensor, activation or alias has this name"
        )


def _code(name: str, array: Array) -> str:
    """Return safetensors' name of the dtype. Raises ValueError if there is none."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in CODES:
        raise ValueError(f"{name} has dtype {array.dtype}, which the file cannot hold")
    return CODES[dtype]


def _concatenated(arrays: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *(array.reshape(-1) for array in arrays)])


def _canonical_json(value: Any) -> bytes:
    """Equal values give equal bytes: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _safetensors(entries: Mapping[str, Array]) -> bytes:
    """Return a safetensors file with its digest filled in.

    The safetensors library orders the metadata at random; here equal entries give equal bytes.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "ddq", "sha256": "0" * 64, "version": VERSION}
    }
    # The widest dtype first keeps all entries aligned.
    order = sorted(entries, key=lambda name: (-entries[name].itemsize, name))
    start = 0
    for name in order:
        entry = entries[name]
        header[name] = {
            "data_offsets": [start, start + entry.nbytes],
            "dtype": CODES[entry.dtype],
            "shape": [entry.size],
        }
        start += entry.nbytes
    text = _canonical_json(header)
    text += b" " * (-len(text) % 8)
    data = [entries[name].tobytes() for name in order]
    raw = bytearray(b"".join([len(text).to_bytes(8, "little"), text, *data]))
    digest = 8 + len(decoder.HEAD)
    raw[digest : digest + 64] = hashlib.sha256(raw).hexdigest().encode("ascii")
    return bytes(raw)
