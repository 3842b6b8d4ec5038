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
from ddqcli.json_text import parse_json
from ddqcli.runs.files import make_folder, open_own, write_atomic
from ddqcli.runs.marker import token_of
from ddqcli.runs.names import RUNS
from ddqcli.runs.state_home import read_own, state_home

_MOST = 1 << 20  # bytes that are read; a line has some 100
_LARGE = _MOST // 2  # then lines that do not count any more are removed


def remember_folder(folder: Path) -> str | None:
    """Note that a run in `folder` was begun in this working folder, unless runs/ shows it anyway.

    Returns None, or the reason why it cannot be noted.
    """
    real = folder.resolve()
    if real.parent == Path(RUNS).resolve():
        return None
    try:
        path = _path()
        make_folder(path.parent, 0o700)
        if path.exists() and path.stat().st_size > _LARGE:
            text = "".join(_line(*entry) for entry in _living().items()).encode()
            write_atomic(path, lambda temporary: temporary.write_bytes(text), mode=0o600)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with open(open_own(path, flags, 0o600), "a", encoding="utf-8") as file:
            file.write(_line(str(real), token_of(folder)))  # at once: others may begin a run, too
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError, DDQError) as error:
        return getattr(error, "strerror", None) or str(error).rstrip(".")
    return None


def remembered_folders() -> list[Path]:
    """Return the folders that still hold the runs begun in this working folder."""
    return [_shortest(Path(folder)) for folder in _living()]


def _living() -> dict[str, str]:
    """Return the folders whose lines count, with their tokens."""
    try:
        lines = read_own(_path(), _MOST).decode("utf-8", "replace").splitlines()
    except (OSError, RuntimeError, ValueError):
        return {}
    tokens: dict[str, str] = {}
    for line in lines:
        with suppress(ValueError, LookupError, TypeError):
            entry = parse_json(line)
            tokens[str(entry["folder"])] = str(entry["token"])
    return {
        folder: token
        for folder, token in tokens.items()
        if token and token_of(Path(folder)) == token
    }


def _line(folder: str, token: str) -> str:
    return json.dumps({"token": token, "folder": folder}) + "\n"


def _path() -> Path:
    name = hashlib.sha256(os.fsencode(os.getcwd())).hexdigest()[:32]
    return state_home() / "elsewhere" / f"{name}.jsonl"


def _shortest(folder: Path) -> Path:
    """Return a folder below the working folder as a relative path."""
    working = Path.cwd()
    return folder.relative_to(working) if folder.is_relative_to(working) else folder
