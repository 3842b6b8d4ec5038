"""metrics.jsonl: one JSON object a line, either the metrics of a step or a snapshot of tensors.

The last line may be cut short, by a process that was killed while it wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddqcli.runs.files import disk_errors, write_atomic


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in the file, without damaged lines; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    return [entry for line in lines if (entry := _parse(line)) is not None]


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Append one object. Raises UsageError or DDQError if the disk refuses."""
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def is_snapshot(entry: dict[str, Any]) -> bool:
    """True for a snapshot of tensors, False for the metrics of a step."""
    return "levels" in entry


def truncate(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`."""
    text = "".join(f"{json.dumps(e)}\n" for e in read_lines(path) if e["step"] <= step)
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def _parse(line: str) -> dict[str, Any] | None:
    """Return the object in a line; None if the line is damaged."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, LookupError, TypeError):
        return None
