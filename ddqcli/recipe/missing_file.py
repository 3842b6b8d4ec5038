"""The sentence about a file that is not there: where it was looked for, and what is there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CHECKPOINTS = (".pt", ".pth", ".th", ".safetensors")
_MOST = 4  # files named


def missing_file(path: Path, what: str = "file", suffixes: Sequence[str] = ()) -> str:
    """Return `There is no checkpoint net.pt in /work; did you mean nets.pt?`.

    Without a similar name, those with one of the `suffixes` are named, by default the path's own.
    """
    folder = path.parent
    if not folder.is_dir():
        return f"There is no {what} {path}: there is no folder {folder.absolute()}."
    names: list[str] = []
    with suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    start = f"There is no {what} {path} in {folder.resolve()}"
    if near := difflib.get_close_matches(path.name, names, n=1, cutoff=0.7):
        return f"{start}; did you mean {folder / near[0]}?"
    endings = suffixes or [path.suffix]
    alike = [str(folder / name) for name in names if Path(name).suffix in endings]
    if alike:
        more = f" and {len(alike) - _MOST} more" if len(alike) > _MOST else ""
        return f"{start}; it has {', '.join(alike[:_MOST])}{more}."
    return f"{start}, nor any other {' or '.join(filter(None, endings)) or 'file like it'}."
