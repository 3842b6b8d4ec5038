"""Encode a ddq file as bytes, as FORMAT.md describes it; callers write them to disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.manifest import (
    CONSTANTS_VERSION,
    VERSION,
    activation_leaf,
    alias_leaf,
    constant_leaf,
    encode_header,
    encode_manifest,
    float_leaf,
    quantized_leaf,
)
from ddqcli.artifact.packing import pack
from ddqcli.artifact.sizes import Sizes, measure
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor, check_aliases

Array = NDArray[Any]


def encode_artifact(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, Array],
    aliases: Mapping[str, str],
    meta: Mapping[str, Any],
    constants: Mapping[str, Array] | None = None,
) -> tuple[bytes, Sizes]:
    """Return the bytes of a file, and where they went. Equal content in any order: equal bytes.

    Args:
        quantized: tensors as indices into level vectors.
        activations: level vectors of layers' inputs.
        floats: unquantized tensors by name, of any dtype.
        aliases: further names of shared tensors, each with the name that is stored.
        meta: JSON without NaN.
        constants: unquantized tensors of equal, finite elements, of which the manifest holds one.

    Raises ValueError if a name occurs twice, an alias points nowhere, or a dtype cannot be stored.
    """
    records: list[QuantizedTensor | ActivationTable] = sorted(
        [*quantized, *activations], key=lambda record: record.name
    )
    constants = constants or {}
    _check_names([record.name for record in records], floats, constants, aliases)
    check_aliases(aliases, {*floats, *constants, *(tensor.name for tensor in quantized)})
    leaves = {name: alias_leaf(target) for name, target in aliases.items()}
    leaves |= {name: constant_leaf(name, array) for name, array in constants.items()}
    parts: dict[str, list[Array]] = {"quantized": []}  # arrays of each entry
    for record in records:
        leaves[record.name] = (
            quantized_leaf(record.shape, record.axis)
            if isinstance(record, QuantizedTensor)
            else activation_leaf()
        )
        parts["quantized"] += _record(record)
    for name, array in sorted(floats.items()):
        leaves[name] = float_leaf(name, array.dtype, array.shape)
        parts.setdefault(leaves[name][0], []).append(array)
    parts["manifest"] = [encode_manifest(leaves, meta)]
    entries = {
        entry: _concatenated(arrays, decoder.DTYPES.get(entry.upper(), "u1"))
        for entry, arrays in parts.items()
    }
    raw = _safetensors(entries, CONSTANTS_VERSION if constants else VERSION)
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


def _check_names(*names: Iterable[str]) -> None:
    counts = Counter(chain(*names))
    if duplicates := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(
            f"{', '.join(duplicates)}: more than one tensor, activation or alias has this name"
        )


def _concatenated(arrays: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *(array.reshape(-1) for array in arrays)])


def _safetensors(entries: Mapping[str, Array], version: str) -> bytes:
    """Return a safetensors file with its digest filled in."""
    described = {name: (e.dtype, e.size) for name, e in entries.items()}
    header, order = encode_header(described, version)
    raw = bytearray(b"".join([header, *(entries[name].tobytes() for name in order)]))
    digest = 8 + len(decoder.HEAD)
    raw[digest : digest + 64] = hashlib.sha256(raw).hexdigest().encode("ascii")
    return bytes(raw)
