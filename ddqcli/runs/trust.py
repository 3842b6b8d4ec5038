"""Trust in the code that a run folder names: this machine knows the runs that its user made here.

A run folder may come from anyone, so nothing in it can vouch for itself. A run is recorded outside
it, in `$XDG_STATE_HOME/ddq/runs/TOKEN.json`, with hashes of its calls and its code. Its code
runs again while nothing of it has changed, or if the user says so with `--trust`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder, all_suffixes
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from ddqcli.errors import DDQError
from ddqcli.hashing import sha256_of_files
from ddqcli.recipe.consent import code_fields, code_file, code_rule, describe_code
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.files import write_atomic
from ddqcli.runs.marker import token_of
from ddqcli.runs.run import Run
from ddqcli.runs.state_home import read_own, state_home

_MAX_RECORD = 1 << 20  # bytes; one of a thousand files takes a tenth
_INSTALLED = {
    Path(path).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_paths().get(name))
}


@contextmanager
def code_of(run: Run) -> Iterator[None]:
    """Refuse in this block the code that a run names, unless this user made the run or trusts it.

    What is refused raises UsageError, which names the file and the remedy.
    """
    reason = None if run.trusted else _distrust(run)

    def refuse(code: str) -> str:
        return (
            f"{run.recipe_path} names the code {describe_code(code)}, and {reason}; give --trust "
            "(or set DDQ_TRUST=1) to run it"
        )

    with code_rule(refuse if reason else None):
        yield


def remember(run: Run, recipe: Recipe) -> str | None:
    """Record a run that this user makes, once its code is imported.

    Returns None, or the reason why it cannot be recorded. A run without code needs no record.
    """
    codes = _codes(recipe)
    if not any(map(code_file, codes)):
        return None
    try:
        record = {"calls": _calls(recipe), "code": [_describe(code) for code in codes]}
        path = _record_path(run)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps(record).encode()
        write_atomic(path, lambda temporary: temporary.write_bytes(text))
        path.chmod(0o600)
    except (OSError, RuntimeError, DDQError) as error:
        return getattr(error, "strerror", None) or str(error).rstrip(".")
    return None


def _distrust(run: Run) -> str | None:
    """Return why the run's code must not run; None if it is as it was when this user ran it."""
    unknown = "this machine has no record of making this run"
    try:
        record, recipe = _read_record(_record_path(run)), run.recipe()
        if record["calls"] != _calls(recipe):
            return f"{run.recipe_path.name} has changed since this machine made the run"
        for code, known in zip(_codes(recipe), record["code"], strict=True):
            if change := _change(code, known):
                return f"{change} since this machine made the run"
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return unknown
    return None


def _codes(recipe: Recipe) -> list[str]:
    """Return what may be code in a recipe. `DATASET:ROOT` of torchvision leads to no file."""
    return list(code_fields(recipe).values())


def _calls(recipe: Recipe) -> str:
    """Return a hash of the functions that a recipe calls, and of their arguments."""
    functions = [code.rpartition(":")[2] for code in _codes(recipe) if ":" in code]
    arguments = [recipe.model.kwargs, recipe.data.kwargs, recipe.train.teacher.kwargs]
    calls = [functions, arguments, recipe.model.pickle]
    return hashlib.sha256(json.dumps(calls, sort_keys=True).encode()).hexdigest()


def _describe(code: str) -> dict[str, Any] | None:
    """Return the hashes of a code's file and of the modules below its folder that are imported.

    None for installed packages, which the user updates.
    """
    file = code_file(code)
    if file is None or _is_installed(file):
        return None
    folder = file.parent.resolve()
    files = {folder / file.name}  # it may be a link to a file elsewhere
    if ":" in code:
        loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        # A Path of each of thousands of modules would take most of a run's start.
        near = [name for name in loaded if name and _may_be_below(name, str(folder))]
        paths = [Path(name) for name in near if os.path.isabs(name)]
        files |= {path for path in paths if path.is_relative_to(folder) and path.is_file()}
    names = sorted(str(path.relative_to(folder)) for path in files if not _is_installed(path))
    return {
        "folder": str(folder),
        "files": {name: sha256_of_files(folder / name) for name in names},
        "importable": _importable(folder, names) if ":" in code else [],
    }


def _may_be_below(name: str, folder: str) -> bool:
    """True for each path below the folder, also if it is not in normal form."""
    return name.startswith(folder) or "//" in name or "/./" in name


def _change(code: str, known: dict[str, Any] | None) -> str | None:
    """Return what has changed in a code since it was recorded as `known`."""
    file = code_file(code)
    if file is None or _is_installed(file):
        return None if known is None else f"{code} has moved"
    if known is None:
        return f"{file} has come to be"
    folder, files = file.parent.resolve(), known["files"]
    if file.name not in files:
        return f"{file} has come to be"
    for name, digest in files.items():
        if sha256_of_files(folder / name) != digest:
            return f"{folder / name} has changed"
    if ":" in code:
        stems = {Path(name).parts[0].partition(".")[0] for name in files}
        stems |= {Path(name).name.partition(".")[0] for name in files}
        for name in sorted(set(_importable(folder, list(files))) - set(known["importable"])):
            stem = Path(name).name.partition(".")[0]
            if stem in stems or _is_importable_elsewhere(stem, folder):
                return f"{folder / name} has come to hide another module"
        compiled = (Path(cache_from_source(str(folder / name))) for name in files)
        if str(folder) != known["folder"] and any(path.exists() for path in compiled):
            # A copy's __pycache__ may hold other code than the files that were compared.
            sys.pycache_prefix = os.devnull
    return None


def _importable(folder: Path, names: list[str]) -> list[str]:
    """Return the files and packages in the folders of `names` that Python could import."""
    found = set()
    for parent in {(folder / name).parent for name in names}:
        for entry in parent.iterdir():
            is_module = entry.name.endswith(tuple(all_suffixes()))
            if is_module or any((entry / f"__init__{end}").exists() for end in all_suffixes()):
                found.add(str(entry.relative_to(folder)))
    return sorted(found)


def _is_importable_elsewhere(name: str, folder: Path) -> bool:
    others = [path for path in sys.path if Path(path).resolve() != folder]
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, others) is not None


def _is_installed(file: Path) -> bool:
    return any(file.resolve().is_relative_to(folder) for folder in _INSTALLED)


def _record_path(run: Run) -> Path:
    """Raises ValueError for a folder without a marker, RuntimeError without a home."""
    token = token_of(run.path)
    if not token:
        raise ValueError(f"{run.path} has no marker")
    return state_home() / "runs" / f"{token}.json"


def _read_record(path: Path) -> dict[str, Any]:
    """Read a record that nobody but this user can have written."""
    record: dict[str, Any] = json.loads(read_own(path, _MAX_RECORD))
    return record
