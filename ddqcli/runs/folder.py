"""Create, find, lock and remove run folders."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ddqcli.errors import UsageError
from ddqcli.runs.files import disk_errors, open_own, temporary_prefix, try_lock
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
        path.mkdir(parents=True, exist_ok=True)
        if read_marker(path) is None:
            if any(path.iterdir()):
                raise UsageError(
                    f"{path} holds files that ddq did not write, and a run might replace them; "
                    "name a new or empty folder with --run-dir."
                )
            make_marker(path)
    return path


def find_finished(path: Path | None) -> Path:
    """Return `path` if it is a finished run, or the newest finished run under runs/ for None.

    Raises UsageError if there is none.
    """
    if path is None:
        return _newest_finished()
    if not path.is_dir():
        raise UsageError(f"{path} is no run folder; `ddq finetune` makes one under {RUNS}/.")
    if (path / REPORT).is_file():
        return path
    if is_sweep(path) and (reports := sorted(path.glob(f"*/{REPORT}"))):
        names = ", ".join(str(report.parent) for report in reports)
        raise UsageError(f"{path} holds several runs; name one: {names}.")
    raise UsageError(f"{path} holds no finished run: {REPORT} is missing.")


def find_unfinished(path: Path | None, *, or_none: bool = False) -> Path | None:
    """Return the run or sweep to resume: the one at `path`, or the newest unfinished for None.

    A run inside a sweep stands for the whole sweep; one at `path` may also be finished. If there
    is none, returns None with `or_none` and raises UsageError otherwise.
    """
    if path is None:
        begun = [folder for folder in _own_folders("*") if recipe_path(folder).is_file()]
        folders = [folder for folder in begun if not is_finished(folder)]
        where = f"under {Path(RUNS).resolve()}; name one with --run-dir"
    else:
        parent = path.parent if path.name else path.absolute().parent
        folder = parent if is_sweep(parent) else path
        folders = [folder] if recipe_path(folder).is_file() else []
        where = f"in {path}: {RECIPE} is missing"
    if folders:
        return max(folders, key=_time_of_making)
    if or_none:
        return None
    raise UsageError(f"There is no unfinished run {where}.")


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
            path.mkdir(parents=True)
            make_marker(path)
            return path
    raise AssertionError("unreachable")


@contextmanager
def _creation_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"The run folder {path} cannot be made: {error.strerror}.") from error


def _newest_finished() -> Path:
    """Return the newest finished run under runs/, runs of sweeps included."""
    runs = [run for run in (*_own_folders("*"), *_own_folders("*/*")) if (run / REPORT).is_file()]
    if runs:
        return max(runs, key=_time_of_making)
    unfinished = len([run for run in _own_folders("*") if recipe_path(run).is_file()])
    there = f"{unfinished} unfinished and no finished run" if unfinished else "no run"
    raise UsageError(
        f"There is {there} under {Path(RUNS).resolve()}; `ddq finetune MODEL` makes one, or name "
        "a run folder."
    )


def _own_folders(pattern: str) -> list[Path]:
    """Return the folders under runs/ that ddq has made; other tools have folders there too."""
    return sorted(path for path in Path(RUNS).glob(pattern) if read_marker(path))


def _time_of_making(folder: Path) -> int:
    """Return when the folder was made. File times would not survive a copy."""
    marker = read_marker(folder)
    return marker.created if marker else 0
