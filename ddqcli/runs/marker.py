"""The marker of a run folder: made with the folder, it tells ddq's folders from all others.

It holds a random token, by which this machine knows its own runs again (see `trust.py`) and which
is part of the names of a run's temporary files, and the time of its making.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from ddqcli.runs.files import open_own, write_atomic
from ddqcli.runs.names import MARKER


@dataclass(frozen=True)
class Marker:
    """The content of a marker."""

    token: str  # 32 hexadecimal digits
    created: int  # nanoseconds since 1970


def make_marker(folder: Path) -> None:
    """Mark a new or empty folder as ddq's. Raises UsageError or DDQError if the disk refuses."""
    text = f"{secrets.token_hex(16)} {time.time_ns()}\n"
    write_atomic(folder / MARKER, lambda temporary: temporary.write_text(text, "ascii"))


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a folder; None if ddq did not make the folder."""
    try:
        with open(open_own(folder / MARKER, os.O_RDONLY), "rb") as file:
            found = re.fullmatch(rb"([0-9a-f]{32}) ([0-9]{1,20})\n", file.read(100))
    except Exception:  # no marker, no permission, a link, a device
        return None
    return Marker(found[1].decode(), int(found[2])) if found else None


def token_of(folder: Path) -> str:
    """Return the folder's token, or "" for a folder that ddq did not make."""
    marker = read_marker(folder)
    return marker.token if marker else ""
