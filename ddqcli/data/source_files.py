"""A fingerprint of the files that data are read from: names, sizes and contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from ddqcli.hashing import sha256_of_files

WHOLE_BYTES = 2 << 30  # of data, in the order of names, are read whole; of the rest both ends
_END = 1 << 16  # bytes of an end
_THREADS = 8


def fingerprint_of_files(source: str | None) -> str:
    """Return a hash of the files of `data.source`, if that is an image folder or a .npz file.

    Any other source has "": torchvision verifies its data sets, and a factory's data may lie
    anywhere. Beyond WHOLE_BYTES, only the first and last 64 kB of each file count, so that large
    data sets do not delay a run by hours.
    """
    root = Path(source or "").expanduser()
    if not source or not root.exists():
        return ""
    splits = [root / split for split in ("train", "val", "test")] if root.is_dir() else []
    visited: set[tuple[int, int]] = set()
    paths = [path for split in splits if split.is_dir() for path in _files(split, visited)]
    paths += [root] if root.is_file() else []
    sizes = [path.stat().st_size for path in paths]
    whole = [end <= WHOLE_BYTES for end in accumulate(sizes)]
    with ThreadPoolExecutor(_THREADS) as threads:
        contents = threads.map(_hash, paths, sizes, whole)
        lines = [
            f"{os.path.relpath(path, root)!r} {size} {content}"
            for path, size, content in zip(paths, sizes, contents, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield all regular files below a folder in the order of names; enter no folder twice."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for entry in sorted(folder.iterdir()):
        if entry.is_file():
            yield entry
        elif entry.is_dir():
            yield from _files(entry, visited)


def _hash(path: Path, size: int, whole: bool) -> str:
    if whole or size <= 2 * _END:
        return sha256_of_files(path)
    with path.open("rb") as file:
        begin = file.read(_END)
        file.seek(-_END, os.SEEK_END)
        return hashlib.sha256(begin + file.read(_END)).hexdigest()
