"""Small files that ask for far more memory than they have bytes."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ddqcli.artifact.decoder import HEAD


def repacked(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the record of a `torch.save` file that is called `name`, with right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            is_it = record.rpartition("/")[2] == name
            archive.writestr(record, change(content) if is_it else content)


def strided(path: Path, side: int = 10**6) -> None:
    torch.save({"w": torch.zeros(1).expand(side, side)}, path)


def strided_in_final(path: Path) -> None:
    final = torch.load(path, weights_only=True)
    final["floats"]["1.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(final, path)


def memo(path: Path, index: int = 1 << 28) -> None:
    """Insert five bytes that store a value at a far index of the pickle's memo."""
    torch.save({"w": torch.ones(4, 4)}, path)
    bomb = pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", index) + pickle.POP
    repacked(path, "data.pkl", lambda raw: raw[:2] + bomb + raw[2:])


def manifest(path: Path, parts: int = 64) -> None:
    """Write a ddq file whose manifest unpacks to 64 MB a part, under a right digest."""
    packed = bz2.compress(bytes(1 << 26)) * parts
    header = HEAD + b"0" * 64 + b'","version":"1"},"manifest":{"data_offsets":[0,%d],' % len(packed)
    header += b'"dtype":"U8","shape":[%d]}}' % len(packed)
    raw = bytearray(len(header).to_bytes(8, "little") + header + packed)
    raw[50:114] = hashlib.sha256(raw).hexdigest().encode()
    path.write_bytes(raw)


def overlapping(path: Path, copies: int = 1000) -> None:
    """Write a zip file with a thousand names for the same megabyte."""
    torch.save({"w": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (data,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
        archive.filelist += [data] * copies
        archive._didModify = True


def npz_claim(path: Path, count: int = 10**6) -> None:
    """Write an array that claims a million times `count` values in its header."""
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (count, 10**3, 10**3)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", header.getvalue())


def deflated(path: Path, megabytes: int) -> None:
    """Write a checkpoint and an archive of arrays whose zeros are packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x/data.pkl", "x/version", "x/data/0", "x_train.npy"):
            archive.writestr(name, bytes(megabytes << 20))


def aliases(path: Path, depth: int) -> None:
    """Write YAML that grows tenfold a line."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    path.write_text("\n".join(lines))


def keys(path: Path, count: int) -> None:
    path.write_text("".join(f"k{n}: {n}\n" for n in range(count)))


def deep(path: Path, depth: int) -> None:
    """Write JSON and YAML in which each value holds the next."""
    path.write_text('{"x":' * depth + "[" * depth)


def header_claim(path: Path, length: int) -> None:
    """Write a safetensors file that claims a header of such a length."""
    path.write_bytes(length.to_bytes(8, "little") + b'{"w":{"dtype":"F32"')


def tensors_claim(path: Path, count: int) -> None:
    """Write a safetensors file of empty tensors with large other dimensions."""
    entry = {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}
    text = json.dumps({f"w{n}.weight": entry for n in range(count)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def png_claim(path: Path, side: int) -> None:
    """Write a picture that claims so many rows and columns."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0), b"IDAT": b"x\x9c"}
    chunks = [len(c).to_bytes(4, "big") + k + c + struct.pack(">I", zlib.crc32(k + c))
              for k, c in parts.items()]  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def loops(path: Path, count: int) -> None:
    """Put links to itself and to its parents into a folder."""
    for n in range(count):
        (path.parent / f"l{n}").symlink_to(("." if n % 2 else ".."), target_is_directory=True)
