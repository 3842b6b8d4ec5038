"""Consent: code that a file names runs only if the person at the keyboard agreed to it.

Code runs in two places: `ddqcli.recipe.factory` imports a factory, and `ddqcli.checkpoint`
unpickles a module. Both call `require_consent` first. What the command line names runs. What only a
file names runs under the rule of `code_rule`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from ddqcli.errors import UsageError

if TYPE_CHECKING:
    from ddqcli.recipe.schema import Recipe

Rule = Callable[[str], str | None]  # code, as a recipe names it -> why it must not run, or None

_rules: list[Rule] = []  # of the blocks that are running; every thread obeys them


@contextmanager
def code_rule(rule: Rule | None) -> Iterator[None]:
    """Refuse code that `rule` gives a reason against while the block runs; None refuses nothing."""
    if rule is None:
        yield
        return
    _rules.append(rule)
    try:
        yield
    finally:
        _rules.remove(rule)


def require_consent(code: str) -> None:
    """Raise UsageError, with the reason and the remedy, if `code` must not run here.

    `code` is a factory (`package.module:factory` or `file.py:factory`) or a pickled file.
    """
    for rule in _rules:
        if reason := rule(code):
            raise UsageError(reason)


def code_fields(recipe: Recipe) -> dict[str, str]:
    """Return the fields of a recipe that may name code: what is not a name of torchvision's."""
    model, teacher, data = recipe.model, recipe.train.teacher, recipe.data
    texts = {
        "model.arch": model.arch,
        "train.teacher.arch": teacher.arch,
        "data.source": data.source,
    }
    codes = {key: text for key, text in texts.items() if text and ":" in text}
    pickled = {"model.checkpoint": model.checkpoint, "train.teacher.checkpoint": teacher.checkpoint}
    return codes | {key: text for key, text in pickled.items() if text and model.pickle}


def found_recipe_rule(path: Path, codes: Mapping[str, str]) -> Rule:
    """Return the rule for a recipe that lay beside the checkpoint and that the user did not name.

    It may set numbers, not code. `codes` maps fields to the code that the recipe names in them.
    """
    key_of = {code: key for key, code in codes.items()}

    def refuse(code: str) -> str | None:
        if code not in key_of:
            return None
        return (
            f"{path} was not named but lay beside the checkpoint, so its {key_of[code]}: "
            f"{describe_code(code)} does not run; name it with --recipe {path} if you trust it"
        )

    return refuse


def code_file(code: str) -> Path | None:
    """Return the file that `code` would run; None if there is none. Imports nothing."""
    location, colon, _ = code.rpartition(":")
    if not colon:
        return Path(code)  # a pickled file
    if location.endswith(".py"):
        return Path(location)
    if not all(part.isidentifier() for part in location.split(".")):
        return None
    search = [str(Path.cwd()), *sys.path]  # as the import of a factory does
    spec = None
    for count in range(1, location.count(".") + 2):
        spec = PathFinder.find_spec(".".join(location.split(".")[:count]), search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec and spec.origin else None


def describe_code(code: str) -> str:
    """Return `code`, and the file that it would run if that is not plain from it."""
    file = code_file(code)
    return code if file is None or str(file) in code else f"{code} ({file})"
