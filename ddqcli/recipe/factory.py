"""Import the function that a recipe names, and report errors in user code as one sentence."""

from __future__ import annotations

import ast
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
from ddqcli.recipe.consent import require_consent
from ddqcli.recipe.missing_file import missing_file

FACTORY_SPEC = "write it as package.module:factory or path/to/file.py:factory"
_MOST_NAMED = 5  # functions of a file that an error message names


def import_factory(spec: str) -> Callable[..., Any]:
    """Return the function that `spec` names. Raises UsageError, also without consent to run it.

    `spec` is `package.module:factory` or `path/to/file.py:factory`.
    """
    require_consent(spec)
    location, _, name = spec.rpartition(":")
    if not name and location.endswith(".py"):
        raise UsageError(missing_function(Path(location)))
    if not location or not name:
        raise UsageError(f"{spec!r} names no function; {FACTORY_SPEC}.")
    is_file = location.endswith(".py")
    module = _import_file(Path(location)) if is_file else _import_module(location)
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if callable(factory):
        return factory
    near = difflib.get_close_matches(name, _public_functions(module), n=8, cutoff=0.0)
    fault = "is no function" if hasattr(module, name) else "is not there"
    others = f"it has {', '.join(near)}" if near else "it has no functions"
    raise UsageError(f"{name} {fault} in {location}; {others}.")


def missing_function(path: Path) -> str:
    """Return a sentence about a .py file without `:function`. Reads the file, and runs nothing."""
    if not path.is_file():
        return missing_file(path)
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError):
        body = []
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]
    choices = " or ".join(f"{path}:{name}" for name in names[:_MOST_NAMED])
    return f"{path} names a file, and no function in it; write {choices or f'{path}:FUNCTION'}."


@contextmanager
def user_errors(source: str) -> Iterator[None]:
    """Turn whatever a user's code raises, SystemExit included, into one UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{source} raised {type(error).__name__}{': ' + message if message else ''}"
        ) from error


def _public_functions(module: ModuleType) -> list[str]:
    """Return the module's public callables, without imported ones if it has any of its own."""
    public = {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    }
    own = [n for n, value in public.items() if _module_of(value) == module.__name__]
    return own or list(public)


def _module_of(value: Any) -> str | None:
    return getattr(value, "__module__", None)


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
    """Import a file once, under its own name, so that worker processes can import it too."""
    if not path.is_file():
        raise UsageError(missing_file(path))
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{zlib.crc32(bytes(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file has both
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with user_errors(str(path)), _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Put `folder` first on sys.path, as when a file in it is run; leave it there as the last.

    Functions may import their neighbors later, but these must not hide other modules.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
