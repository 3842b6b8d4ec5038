"""Create, lock and remove run folders."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ddqcli.errors import UsageError
from ddqcli.runs.files import (
    disk_errors,
    is_temporary,
    make_folder,
    open_own,
    sync_folder,
    temporary_prefix,
    try_lock,
)
from ddqcli.runs.marker import make_marker, read_marker
from ddqcli.runs.names import LAST, LOCK, MARKER, RECIPE, REPORT, RUNS, SWEEP, SWEEP_RECIPE

_MAX_NAME = 150  # bytes of a run's name in the name of its folder; file systems allow 255


def is_sweep(folder: Path) -> bool:
    """True if the folder holds one run for each of several targets."""
    return (folder / SWEEP_RECIPE).is_file()


def is_finished(folder: Path) -> bool:
    """True if the file that is written last exists."""
    return (folder / (SWEEP if is_sweep(folder) else REPORT)).is_file()


def recipe_path(folder: Path) -> Path:
    """Return the path of the resolved recipe, of a run or of a sweep."""
    return folder / (SWEEP_RECIPE if is_sweep(folder) else RECIPE)


def create_folder(path: Path | None, name: str) -> Path:
    """Make a folder at `path`, or at runs/<time>-<name>, and mark it as ddq's.

    Raises UsageError if it cannot be made, already holds a run, or holds files of others.
    """
    if path is None:
        return _create_timestamped(name)
    if recipe_path(path).exists():
        raise UsageError(
            f"{path} already holds a run; give another --run-dir, or --resume to go on with it."
        )
    with _creation_errors(path):
        make_own_folder(path, "a run might replace them", "--run-dir")
    return path


def make_own_folder(path: Path, danger: str, option: str) -> None:
    """Make a folder that holds ddq's files alone, with a marker.

    Raises UsageError, with the `danger` and the `option` that names another folder, if it holds
    files of others; OSError if it cannot be made.
    """
    make_folder(path)
    if read_marker(path) is not None:
        return
    # A kill before the marker had its name may have left it under another.
    if any(not is_temporary(entry.name) for entry in path.iterdir()):
        raise UsageError(
            f"{path} holds files that ddq did not write, and {danger}; name a new or empty folder "
            f"with {option}."
        )
    make_marker(path)


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold the folder's lock, to write in it.

    Raises UsageError if another process holds it, or if ddq did not make the folder.
    """
    marker = read_marker(path)
    if marker is None:
        raise UsageError(
            f"{path} was not made by ddq, as its marker {MARKER} is missing; begin a new run."
        )
    with disk_errors(path):
        lock = os.fdopen(open_own(path / LOCK, os.O_RDWR | os.O_CREAT), "rb")
    with lock:
        if not try_lock(lock):
            raise _busy(path)
        # Of a process that was killed while it wrote.
        for leftover in path.glob(f"{temporary_prefix(marker.token)}*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


@contextmanager
def hold_for_reading(path: Path) -> Iterator[None]:
    """Keep other processes from writing in the folder, where it can be locked at all.

    Raises UsageError if another process is writing in it.
    """
    try:
        lock = os.fdopen(open_own(path / LOCK, os.O_RDONLY), "rb")
    except (OSError, UsageError):  # it was never locked, or its files are read-only to this user
        yield
        return
    with lock:
        if not try_lock(lock, shared=True):
            raise _busy(path)
        yield


def is_busy(path: Path) -> bool:
    """True if another process is writing in the folder."""
    try:
        with hold_for_reading(path):
            return False
    except UsageError:
        return True


def resume_command(path: Path) -> str:
    """Return the command that goes on with the run or sweep in a folder."""
    return f"ddq finetune --resume --run-dir {shlex.quote(str(path))}"


def remove_if_untrained(path: Path) -> None:
    """Remove the folder if it holds no training state; keep files that are not a run's."""
    if read_marker(path) and not any(path.glob(f"*/{RECIPE}" if is_sweep(path) else LAST)):
        for name in (RECIPE, SWEEP_RECIPE, LOCK, MARKER):
            (path / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            path.rmdir()
            if path.parent == Path(RUNS):
                path.parent.rmdir()


def _busy(path: Path) -> UsageError:
    return UsageError(
        f"Another process is working in {path}; wait for it, or name another folder with --run-dir."
    )


def _create_timestamped(name: str) -> Path:
    """Make runs/<time>-<name>, with a number if another run began in the same second."""
    plain_name = re.sub(r"[^\w.-]+", "-", name).encode()[:_MAX_NAME].decode(errors="ignore")
    stem = Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{plain_name}"
    for n in count():
        path = Path(f"{stem}-{n}") if n else stem
        with _creation_errors(path), suppress(FileExistsError):
            make_folder(path.parent)
            path.mkdir()
            make_marker(path)
            sync_folder(path.parent)
            return path
    raise AssertionError("unreachable")


@contextmanager
def _creation_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"The run folder {path} cannot be made: {error.strerror}.") from error
