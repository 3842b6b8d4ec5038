"""Manifest and header of a ddq file as bytes, and their size before the tensors are known."""

from __future__ import annotations

import bz2
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder

VERSION, CONSTANTS_VERSION = "1", "2"  # without and with constants
CODES = {np.dtype(dtype): code for code, dtype in decoder.DTYPES.items()}  # safetensors' dtypes
Leaves = Mapping[str, list[Any]]  # name -> kind and shape, as FORMAT.md describes


def quantized_leaf(shape: tuple[int, ...], axis: int | None) -> list[Any]:
    return [axis, *shape]


def activation_leaf() -> list[Any]:
    return ["levels"]


def alias_leaf(target: str) -> list[Any]:
    return ["alias", target]


def constant_leaf(name: str, array: NDArray[Any]) -> list[Any]:
    """Return the leaf of a tensor of equal elements. Raises ValueError for any other."""
    code, *shape = float_leaf(name, array.dtype, array.shape)
    values = array.reshape(-1)
    if not values.size or array.dtype == decoder.BFLOAT16:
        raise ValueError(f"{name} of {array.dtype}{array.shape} cannot be a constant")
    if values.tobytes() != values[:1].tobytes() * values.size:
        raise ValueError(f"{name} is no constant: its elements differ")
    return ["constant", code, values[0].item(), *shape]


def float_leaf(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return the leaf of an unquantized tensor. Raises ValueError for a dtype without a code."""
    code = CODES.get(dtype.newbyteorder("<"))
    if code is None:
        raise ValueError(f"{name} has dtype {dtype}, which the file cannot hold")
    return [code.lower(), *shape]


def encode_manifest(leaves: Leaves, meta: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the compressed manifest. `meta`: JSON without NaN."""
    text = canonical_json({"meta": dict(meta), "tensors": _tree(leaves)})
    return np.frombuffer(bz2.compress(text), np.uint8)


def encode_header(
    entries: Mapping[str, tuple[np.dtype[Any], int]], version: str = VERSION
) -> tuple[bytes, list[str]]:
    """Return length and header of the file, without its digest, and the order of the entries.

    `entries`: dtype and number of values of each. The safetensors library orders the metadata at
    random; here equal entries give equal bytes.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "ddq", "sha256": "0" * 64, "version": version}
    }
    # The widest dtype first keeps all entries aligned.
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    start = 0
    for name in order:
        dtype, size = entries[name]
        end = start + size * dtype.itemsize
        header[name] = {"data_offsets": [start, end], "dtype": CODES[dtype], "shape": [size]}
        start = end
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def description_bytes(leaves: Leaves, most_quantized: int, meta: Mapping[str, Any]) -> int:
    """Return the bytes of header and manifest, if the entry `quantized` has `most_quantized` bytes.

    If it has fewer, they are as many or up to a few bytes fewer.
    """
    manifest = encode_manifest(leaves, meta)
    sizes = {"quantized": most_quantized, "manifest": manifest.size}
    for kind, *shape in leaves.values():
        if isinstance(kind, str) and kind.upper() in decoder.DTYPES:
            sizes[kind] = sizes.get(kind, 0) + int(np.prod(shape, dtype=np.int64))
    entries = {
        name: (np.dtype(decoder.DTYPES.get(name.upper(), "u1")), size)
        for name, size in sizes.items()
    }
    return manifest.size + len(encode_header(entries)[0])


def canonical_json(value: Any) -> bytes:
    """Equal values give equal bytes: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _tree(leaves: Leaves) -> dict[str, Any]:
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
