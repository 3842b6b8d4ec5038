"""Atomic writes, file locks, and disk errors as one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ddqcli.errors import DDQError, UsageError

_WRONG_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it to `path`.

    Readers see the old file or the new one, also after a crash. Raises UsageError if the place
    cannot be written to, DDQError if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def try_lock(file: IO[str]) -> bool:
    """Take the file's lock until the process ends; return False if another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        pass
    return True


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into UsageError (wrong place) or DDQError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError in place of the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        kind = UsageError if isinstance(cause, _WRONG_PLACE) else DDQError
        raise kind(
            f"{path} cannot be written: {cause.strerror}; what was there before is kept."
        ) from error
