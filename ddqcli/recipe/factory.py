"""Importing the function that a recipe names: package.module:factory or path/to/file.py:factory."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ddqcli.errors import UsageError

FACTORY_SPEC = "write it as package.module:factory or path/to/file.py:factory"


# ---- factories


def import_factory(spec: str) -> Callable[..., Any]:
    """The function 'package.module:factory' or 'path/to/file.py:factory' names. Raises UsageError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{spec!r} names no function; {FACTORY_SPEC}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if callable(factory):
        return factory
    public = [
        key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
    ]
    own = [
        key for key in public if getattr(vars(module)[key], "__module__", None) == module.__name__
    ] or public
    near = difflib.get_close_matches(name, own, n=8, cutoff=0.0)
    state = "is no function" if hasattr(module, name) else "is not there"
    raise UsageError(
        f"{name} {state} in {place}; {'it has ' + ', '.join(near) if near else 'it has no functions'}."
    )


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{name!r} is neither a Python module nor a .py file; {FACTORY_SPEC}.")
    with user_errors(name), _first_on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UsageError(
                f"There is no module {error.name}; install it or name a file, nets.py:factory."
            ) from error


def _import_file(path: Path) -> ModuleType:
    """The file as a module, made once. It keeps the file's name, so that worker processes can import it too."""
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{zlib.crc32(bytes(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # nor is its loader, for a .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with user_errors(str(path)), _first_on_path(path.parent):
            spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Let imports find modules in `folder` first, as when a file in it is run; afterwards they find them last."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Whatever a user's code raises, an exit included, as one UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{what} raised {type(error).__name__}{': ' + said if said else ''}"
        ) from error
