"""metrics.jsonl: one JSON object a line: metrics of a step, a snapshot of tensors, or a look.

The last line may be cut short, by a process that was killed while it wrote.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from ddqcli.errors import DDQError
from ddqcli.json_text import parse_json
from ddqcli.runs.files import disk_errors, open_own, write_atomic

_MOST = 1 << 30  # bytes, a thousand times those of long runs
Kind = Literal["step", "snapshot", "look"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in the file, without damaged lines; none if there is no file.

    Raises DDQError for a file that no run writes in a year.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > _MOST:
        raise DDQError(f"{path} has more than {_MOST:,} bytes; no run writes so many: remove it.")
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    return [entry for line in lines if (entry := _parse(line)) is not None]


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Append one object. Raises UsageError or DDQError if the disk refuses."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with disk_errors(path), open(open_own(path, flags), "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def kind_of(entry: dict[str, Any]) -> Kind:
    """Return the kind of a line, by a key that no other kind has."""
    if "levels" in entry:
        return "snapshot"
    return "look" if "held_out_loss" in entry else "step"


def truncate(path: Path, step: int, owner: str) -> None:
    """Remove the lines of steps after `step`. `owner` is the run's token."""
    text = "".join(f"{json.dumps(e)}\n" for e in read_lines(path) if e["step"] <= step)
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()), owner=owner)


def _parse(line: str) -> dict[str, Any] | None:
    """Return the object in a line; None if the line is damaged."""
    try:
        entry: dict[str, Any] = parse_json(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, LookupError, TypeError):
        return None
