"""Runs outside of runs/, which `--run-dir` put elsewhere: remembered by working folder.

`$XDG_STATE_HOME/ddq/elsewhere/HASH.jsonl` has one line for each run begun in the working folder
with that hash. A line counts while the folder has the marker with the line's token.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from ddqcli.errors import DDQError
from ddqcli.runs.files import open_own
from ddqcli.runs.marker import token_of
from ddqcli.runs.names import RUNS
from ddqcli.runs.state_home import read_own, state_home

_MOST = 1 << 22  # bytes; ten thousand runs take a half


def remember_folder(folder: Path) -> str | None:
    """Note that a run in `folder` was begun in this working folder, unless runs/ shows it anyway.

    Returns None, or the reason why it cannot be noted.
    """
    real = folder.resolve()
    if real.parent == Path(RUNS).resolve():
        return None
    line = json.dumps({"token": token_of(folder), "folder": str(real)})
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with open(open_own(path, flags), "a", encoding="utf-8") as file:
            path.chmod(0o600)
            file.write(f"{line}\n")  # one write, so that runs that begin together keep their lines
    except (OSError, RuntimeError, DDQError) as error:
        return getattr(error, "strerror", None) or str(error).rstrip(".")
    return None


def remembered_folders() -> list[Path]:
    """Return the folders that still hold the runs begun in this working folder."""
    try:
        lines = read_own(_path(), _MOST).decode("utf-8", "replace").splitlines()
    except (OSError, RuntimeError, ValueError):
        return []
    token_of_folder: dict[str, str] = {}
    for line in lines:
        with suppress(ValueError, LookupError, TypeError):
            entry = json.loads(line)
            token_of_folder[str(entry["folder"])] = str(entry["token"])
    return [
        _shortest(Path(folder))
        for folder, token in token_of_folder.items()
        if token and token_of(Path(folder)) == token
    ]


def _path() -> Path:
    name = hashlib.sha256(os.fsencode(os.getcwd())).hexdigest()[:32]
    return state_home() / "elsewhere" / f"{name}.jsonl"


def _shortest(folder: Path) -> Path:
    """Return a folder below the working folder as a relative path."""
    working = Path.cwd()
    return folder.relative_to(working) if folder.is_relative_to(working) else folder
