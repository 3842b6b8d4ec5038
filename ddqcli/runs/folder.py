"""Create, find, lock and remove run folders."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ddqcli.errors import UsageError
from ddqcli.runs.files import disk_errors, try_lock
from ddqcli.runs.names import LAST, LOCK, RECIPE, REPORT, RUNS, SWEEP, SWEEP_RECIPE


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
    """Make a folder at `path`, or at runs/<time>-<name>.

    Raises UsageError if it cannot be made or already holds a run.
    """
    if path is None:
        return _create_timestamped(name)
    if recipe_path(path).exists():
        raise UsageError(
            f"{path} already holds a run; give another --run-dir, or --resume to go on with it."
        )
    with _creation_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def find_finished(path: Path | None) -> Path:
    """Return `path` if it is a finished run, or the newest finished run under runs/ for None.

    Raises UsageError if there is none.
    """
    if path is None:
        return _newest_finished(Path(RUNS))
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
        begun = [folder for folder in Path(RUNS).glob("*") if recipe_path(folder).is_file()]
        folders = [folder for folder in begun if not is_finished(folder)]
        where = f"under {Path(RUNS).resolve()}; name one with --run-dir"
    else:
        parent = path.parent if path.name else path.absolute().parent
        folder = parent if is_sweep(parent) else path
        folders = [folder] if recipe_path(folder).is_file() else []
        where = f"in {path}: {RECIPE} is missing"
    if folders:
        return max(folders, key=lambda folder: recipe_path(folder).stat().st_mtime_ns)
    if or_none:
        return None
    raise UsageError(f"There is no unfinished run {where}.")


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UsageError if another process holds it."""
    with disk_errors(path):
        lock = (path / LOCK).open("a")
    with lock:
        if not try_lock(lock):
            raise UsageError(
                f"Another process is working in {path}; wait for it, or name another folder with "
                "--run-dir."
            )
        for leftover in path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield


def remove_if_untrained(path: Path) -> None:
    """Remove the folder if it holds no training state; keep files that are not a run's."""
    if not any(path.glob(f"*/{RECIPE}" if is_sweep(path) else LAST)):
        for name in (RECIPE, SWEEP_RECIPE, LOCK):
            (path / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            path.rmdir()
            Path(RUNS).rmdir()


def _create_timestamped(name: str) -> Path:
    """Make runs/<time>-<name>, with a number if another run began in the same second."""
    plain_name = re.sub(r"[^\w.-]+", "-", name)
    stem = Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{plain_name}"
    for n in count():
        path = Path(f"{stem}-{n}") if n else stem
        with _creation_errors(path), suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("unreachable")


@contextmanager
def _creation_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"The run folder {path} cannot be made: {error.strerror}.") from error


def _newest_finished(folder: Path) -> Path:
    """Return the newest finished run under `folder`, runs of sweeps included."""
    reports = [*folder.glob(f"*/{REPORT}"), *folder.glob(f"*/*/{REPORT}")]
    if reports:
        runs = sorted(report.parent for report in reports)
        return max(runs, key=lambda run: (run / REPORT).stat().st_mtime_ns)
    unfinished = len([*folder.glob(f"*/{RECIPE}"), *folder.glob(f"*/{SWEEP_RECIPE}")])
    there = f"{unfinished} unfinished and no finished run" if unfinished else "no run"
    raise UsageError(
        f"There is {there} under {folder.resolve()}; `ddq finetune MODEL` makes one, or name a run "
        "folder."
    )
