"""Small files that ask for far more memory than they have bytes."""

from __future__ import annotations

import bz2
import hashlib
import io
import pickle
import struct
import zipfile
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


def strided(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)


def strided_in_final(path: Path) -> None:
    final = torch.load(path, weights_only=True)
    final["floats"]["1.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(final, path)


def memo(path: Path) -> None:
    """Insert five bytes that store a value at index 2^28 of the pickle's memo."""
    torch.save({"w": torch.ones(4, 4)}, path)
    bomb = pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 1 << 28) + pickle.POP
    repacked(path, "data.pkl", lambda raw: raw[:2] + bomb + raw[2:])


def manifest(path: Path) -> None:
    """Write a ddq file whose manifest unpacks to 4 GB, under a right digest."""
    packed = bz2.compress(bytes(1 << 26)) * 64
    header = HEAD + b"0" * 64 + b'","version":"1"},"manifest":{"data_offsets":[0,%d],' % len(packed)
    header += b'"dtype":"U8","shape":[%d]}}' % len(packed)
    raw = bytearray(len(header).to_bytes(8, "little") + header + packed)
    raw[50:114] = hashlib.sha256(raw).hexdigest().encode()
    path.write_bytes(raw)


def overlapping(path: Path) -> None:
    """Write a zip file with a thousand names for the same megabyte."""
    torch.save({"w": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (data,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
        archive.filelist += [data] * 1000
        archive._didModify = True


def npz_claim(path: Path) -> None:
    """Write an array that claims a million million values in its header."""
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**3, 10**3)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", header.getvalue())
