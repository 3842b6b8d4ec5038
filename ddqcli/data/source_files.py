"""A fingerprint of the files that data are read from: names, sizes and contents.

All bytes count. Of large data the result is remembered in `$XDG_STATE_HOME/ddq/data/HASH.json`, a
file for each source, and used while no file has another inode, size or time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ddqcli.errors import DDQError
from ddqcli.hashing import sha256_of_files
from ddqcli.json_text import parse_json
from ddqcli.runs.files import make_folder, write_atomic
from ddqcli.runs.state_home import read_own, state_home

LARGE = 2 << 30  # bytes of all files, which take some seconds to read
_THREADS = 8


def fingerprint_of_files(
    source: str | None, note: Callable[[str], object] = lambda text: None
) -> str:
    """Return a hash of the files of `data.source`, if that is an image folder or a .npz file.

    Any other source has "": torchvision verifies its data sets, and a factory's data may lie
    anywhere. `note` receives a sentence before large data are read.
    """
    root = Path(source or "").expanduser()
    if not source or not root.exists():
        return ""
    splits = [root / split for split in ("train", "val", "test")] if root.is_dir() else []
    visited: set[tuple[int, int]] = set()
    paths = [path for split in splits if split.is_dir() for path in _files(split, visited)]
    paths += [root] if root.is_file() else []
    names = [repr(os.path.relpath(path, root)) for path in paths]
    statuses = [path.stat() for path in paths]
    size = sum(status.st_size for status in statuses)
    state = _hash(
        f"{name} {s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
        for name, s in zip(names, statuses, strict=True)
    )
    if size > LARGE:
        if known := _remembered(root, state):
            return known
        note(f"reading {size / 1e9:.0f} GB of data once, so that --resume knows them again")
    with ThreadPoolExecutor(_THREADS) as threads:
        contents = threads.map(sha256_of_files, paths)
        lines = zip(names, statuses, contents, strict=True)
        result = _hash(f"{name} {status.st_size} {content}" for name, status, content in lines)
    if size > LARGE:
        _remember(root, state, result)
    return result


def _hash(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _remembered(root: Path, state: str) -> str:
    """Return the fingerprint of a source whose files are as they were, or ""."""
    with suppress(OSError, RuntimeError, ValueError, LookupError, TypeError):
        known = parse_json(read_own(_place(root), 1000).decode())
        if known["state"] == state:
            return str(known["fingerprint"])
    return ""


def _remember(root: Path, state: str, fingerprint: str) -> None:
    """Note a fingerprint; without a place for that, the data are read again the next time."""
    text = json.dumps({"state": state, "fingerprint": fingerprint}).encode()
    with suppress(OSError, RuntimeError, DDQError):
        place = _place(root)
        make_folder(place.parent, 0o700)
        write_atomic(place, lambda temporary: temporary.write_bytes(text), mode=0o600)


def _place(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return state_home() / "data" / f"{name}.json"


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
