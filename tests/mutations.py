"""Damage for files that are read: bytes at random, and content under right checksums."""

from __future__ import annotations

import bz2
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return the content with bits flipped, cut, overwritten, repeated or swapped."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        if not raw:
            break
        place, length = draw.randrange(len(raw)), int(draw.expovariate(0.1)) + 1
        way = draw.randrange(7)
        if way == 0:
            raw[place] ^= 1 << draw.randrange(8)
        elif way == 1:
            del raw[place:]
        elif way == 2:
            del raw[place : place + length]
        elif way == 3:
            raw[place : place + length] = draw.randbytes(length)
        elif way == 4:
            raw[place : place + length] = bytes(length)
        elif way == 5:
            raw[place:place] = raw[place : place + length] * draw.choice((1, 10))
        else:
            raw[place : place + 1] = draw.choice((b"\xff", b"\n", b"-1", b"{", b"[[", b"1e999"))
    return bytes(raw)


def changed(tree: Any, draw: random.Random) -> None:
    """Replace, remove or add something at a random place of a JSON value, in place."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.7:
            tree = tree[key]
            continue
        values = [None, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 10**4, [], {}, True, [[[]]]]
        if draw.random() < 0.2:
            del tree[key]
        elif isinstance(tree, dict) and draw.random() < 0.2:
            tree[draw.choice(["", "\x1b[2J", "[/x]", "name", "0"])] = draw.choice(values)
        else:
            tree[key] = draw.choice(values)
        return


def forged_artifact(raw: bytes, draw: random.Random) -> bytes:
    """Change a ddq file's manifest, header or data, and set its digest."""
    way = draw.randrange(3)
    if way == 0:
        return with_manifest(raw, lambda manifest: changed(manifest, draw))
    header, data = _parts(raw)
    if way == 1:
        metadata = header.pop("__metadata__")
        changed(header, draw)
        return _joined({"__metadata__": metadata, **header}, data)
    return _joined(header, mutated(data, draw))


def with_manifest(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a ddq file with a changed manifest, and header and digest that fit."""
    header, data = _parts(raw)
    first, last = header["manifest"]["data_offsets"]
    manifest = json.loads(bz2.decompress(data[first:last]))
    change(manifest)
    packed = bz2.compress(json.dumps(manifest).encode())
    shift = len(packed) - (last - first)
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= last:
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    header["manifest"] |= {"data_offsets": [first, last + shift], "shape": [len(packed)]}
    return _joined(header, data[:first] + packed + data[last:])


def _parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def _joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    result = bytearray(len(text).to_bytes(8, "little") + text + data)
    result[50:114] = b"0" * 64
    result[50:114] = hashlib.sha256(result).hexdigest().encode()
    return bytes(result)
