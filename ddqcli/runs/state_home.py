"""This user's own notes on runs, in `$XDG_STATE_HOME/ddq`: outside of run folders, which may be
anyone's.
"""

from __future__ import annotations

import os
from pathlib import Path


def state_home() -> Path:
    """Return `$XDG_STATE_HOME/ddq`. Raises RuntimeError for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "ddq"


def read_own(path: Path, most: int) -> bytes:
    """Return the first `most` bytes of a file that nobody but this user can have written.

    Raises ValueError if another user can, OSError if it cannot be read.
    """
    with path.open("rb") as file:
        if hasattr(os, "getuid"):
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise ValueError(f"{path} may be another user's")
        return file.read(most)
