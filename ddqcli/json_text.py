"""JSON of files that anyone may have written: bounded in size and depth."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

_MOST = 1 << 26  # bytes; a report of 10,000 layers has some 3 MB


def parse_json(text: str | bytes) -> Any:
    """Return the value. Raises ValueError, also for a text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Return the value in a regular file of at most 64 MB. Raises OSError and ValueError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST:
        raise ValueError(f"{path} is no regular file of at most {_MOST:,} bytes")
    return parse_json(path.read_bytes())
