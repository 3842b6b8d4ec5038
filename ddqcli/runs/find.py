"""Find runs and sweeps: the newest, the unfinished, those in a folder, and one run of a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ddqcli.errors import UsageError
from ddqcli.formatting import natural_sort_key
from ddqcli.runs.elsewhere import remembered_folders
from ddqcli.runs.folder import is_finished, is_sweep, recipe_path, resume_command
from ddqcli.runs.marker import read_marker
from ddqcli.runs.names import RECIPE, REPORT, RUNS


def known_folders() -> list[Path]:
    """Return the runs and sweeps under runs/ and those remembered elsewhere, the newest first."""
    return _newest_first([*Path(RUNS).glob("*"), *remembered_folders()])


def folders_in(folder: Path) -> list[Path]:
    """Return the run or sweep in `folder`, else those one level below, the newest first.

    Raises UsageError if there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.")
    return _newest_first([folder] if recipe_path(folder).is_file() else folder.glob("*"))


def runs_of_sweep(sweep: Path) -> list[Path]:
    """Return the folders of a sweep's runs that have begun, by target, the largest first."""
    runs = [recipe.parent for recipe in sweep.glob(f"*/{RECIPE}")]
    return sorted(runs, key=lambda run: natural_sort_key(run.name), reverse=True)


def target_folder(target: str) -> str:
    """Return the name of a target's folder in a sweep: `4-bits`, `150kB`, `12-percent`."""
    return re.sub(r"[^\w.-]+", "-", target.replace("%", " percent"))


def find_finished(path: Path | None, target: str | None = None) -> Path:
    """Return the finished run at `path`; of a sweep, that of the `target`.

    For None, the newest run or sweep under runs/ or elsewhere stands for `path`. Raises UsageError
    if there is no such run, or if a sweep is meant and no target given.
    """
    folder = _newest_finished() if path is None else path
    if folder.is_file() and target is not None:
        raise UsageError(f"{folder} is no sweep; omit --target.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no run folder; `ddq finetune` makes one under {RUNS}/.")
    if is_sweep(folder):
        return _run_of_target(folder, target)
    if target is not None:
        raise UsageError(f"{folder} is no sweep; omit --target.")
    if not (folder / REPORT).is_file():
        raise UsageError(f"{folder} holds no finished run: {REPORT} is missing.")
    return folder


def find_sweep(path: Path | None) -> Path | None:
    """Return the finished sweep at `path`, or the newest for None; None if a run is there.

    Raises UsageError for None if there is no finished run at all.
    """
    folder = _newest_finished() if path is None else path
    return folder if is_sweep(folder) and is_finished(folder) else None


def find_unfinished(path: Path | None, *, or_none: bool = False) -> Path | None:
    """Return the run or sweep to resume: the one at `path`, or the newest unfinished for None.

    A run inside a sweep stands for the whole sweep; one at `path` may also be finished. If there
    is none, returns None with `or_none` and raises UsageError otherwise.
    """
    if path is None:
        folders = [folder for folder in known_folders() if not is_finished(folder)]
        where = f"under {Path(RUNS).resolve()}; name one with --run-dir"
    else:
        parent = path.parent if path.name else path.absolute().parent
        folder = parent if is_sweep(parent) else path
        folders = [folder] if recipe_path(folder).is_file() else []
        where = f"in {path}: {RECIPE} is missing"
    if folders:
        return folders[0]
    if or_none:
        return None
    raise UsageError(f"There is no unfinished run {where}.")


def _newest_finished() -> Path:
    """Return the newest finished run or sweep. Of an unfinished sweep, its finished runs count.

    Raises UsageError if there is none.
    """
    known = known_folders()
    if finished := _newest_first(_finished_in(known)):
        return finished[0]
    there = f"{len(known)} unfinished and no finished run" if known else "no run"
    raise UsageError(
        f"There is {there} under {Path(RUNS).resolve()}; `ddq finetune MODEL` makes one, or name "
        "a run folder."
    )


def _finished_in(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        if is_finished(folder):
            yield folder
        elif is_sweep(folder):
            yield from filter(is_finished, runs_of_sweep(folder))


def _run_of_target(sweep: Path, target: str | None) -> Path:
    """Return the finished run of a target, which may be given as 3, 3 bits, 150kB or 12%."""
    runs = {run.name: run for run in runs_of_sweep(sweep) if is_finished(run)}
    if not runs:
        raise UsageError(
            f"{sweep} holds no finished run; `{resume_command(sweep)}` goes on with it."
        )
    targets = ", ".join(name.removesuffix("-bits").replace("-percent", "%") for name in runs)
    if target is None:
        raise UsageError(
            f"{sweep} holds several runs; name one, such as {next(iter(runs.values()))}, or pick "
            f"it with --target: {targets}."
        )
    names = [target_folder(target)]
    with suppress(ValueError):
        names.append(target_folder(f"{float(target):g} bits"))
    for name in names:
        if name in runs:
            return runs[name]
    raise UsageError(f"{sweep} holds no finished run of the target {target}, but of: {targets}.")


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    """Return the folders in which ddq has begun a run; other tools have folders there too.

    Their markers tell when they were made. File times would not survive a copy.
    """
    made = {
        folder: marker.created
        for folder in folders
        if recipe_path(folder).is_file() and (marker := read_marker(folder))
    }
    return sorted(made, key=lambda folder: made[folder], reverse=True)
