"""Recipe files: find, read and write YAML, with flags and `--set` over it.

All faults are reported at once. Paths inside a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ddqcli.errors import RecipeError, UsageError
from ddqcli.recipe.assignments import assign
from ddqcli.recipe.faults import describe_fault, field_path, short_repr
from ddqcli.recipe.paths import move_paths
from ddqcli.recipe.schema import Recipe
from ddqcli.recipe.yaml_text import parse_sections

RECIPE_NAME = "ddq.yaml"
_END = b"\n...\n"  # of a resolved recipe
_MAX_SIZE = 1 << 18  # bytes; a recipe with a hundred overrides has a tenth of it
_TARGETS = ("target_bits", "target_size")  # of a budget; either may be a list


def find_recipe(checkpoint: Path | None) -> Path | None:
    """Return `ddq.yaml` in the working folder, else beside the checkpoint; None without either."""
    folders = [Path(), *([checkpoint.parent] if checkpoint else [])]
    paths = (folder / RECIPE_NAME for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def load_recipes(path: Path | None, flags: dict[str, Any] | None = None) -> list[Recipe]:
    """Return one recipe for each target in the file `path`, with `flags` over its values.

    `flags` has dotted names: {'train.epochs': 2, ...}. Without a file, defaults take its place.
    Raises RecipeError with all faults, UsageError if the file cannot be read.
    """
    flags = flags or {}
    raw = {} if path is None else _read(path)
    if any(flags.get(f"budget.{field}") is not None for field in _TARGETS):
        _remove_targets(raw)
    for key, value in flags.items():
        assign(raw, key, value)
    recipes: list[Recipe] = []
    errors: list[ErrorDetails] = []
    for single in _split_by_target(raw):
        try:
            recipes.append(Recipe.model_validate(single))
        except ValidationError as error:
            errors += error.errors()
    if errors:
        raise RecipeError(
            _origin(path, [field_path(error) in flags for error in errors]),
            list(dict.fromkeys(map(describe_fault, errors))),
        )
    targets = [recipe.budget.target for recipe in recipes]
    if duplicate := next((target for target in targets if targets.count(target) > 1), None):
        raise UsageError(f"The target {duplicate} is given twice.")
    return recipes


def dump_recipes(recipes: Sequence[Recipe], folder: Path) -> str:
    """Return recipes that differ only in their targets as one YAML text for a file in `folder`.

    Every field is written out, defaults included. The text ends with YAML's `...`, so that a file
    that was cut short does not pass for one with more defaults.
    """
    raw = recipes[0].model_dump()
    if len(recipes) > 1:
        raw["budget"] |= {
            field: [getattr(recipe.budget, field) for recipe in recipes]
            for field in _TARGETS
            if raw["budget"][field]
        }
    real_folder = os.path.realpath(folder)
    move_paths(raw, lambda path: os.path.relpath(path, real_folder), os.path.exists)
    text: str = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, explicit_end=True)
    return text


def require_whole(path: Path) -> None:
    """Raise RecipeError if the end of a file of `dump_recipes` is missing."""
    if not path.read_bytes().endswith(_END):
        raise RecipeError(str(path), ["  it is cut short: its last line is not `...`"])


def differences(first: Recipe, second: Recipe) -> list[str]:
    """Return the fields in which two recipes differ, as `train.lr: 0.01, now 0.02`.

    Two spellings of the same path are equal.
    """
    before, after = _flatten(first.model_dump()), _flatten(second.model_dump())
    absolute_before, absolute_after = _flatten_absolute(first), _flatten_absolute(second)
    return [
        f"{key}: {short_repr(before.get(key))}, now {short_repr(after.get(key))}"
        for key in sorted(before | after)
        if absolute_before.get(key) != absolute_after.get(key)
    ]


def _read(path: Path) -> dict[str, Any]:
    """Return the sections in a file, with paths relative to the working folder."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"The recipe {path} cannot be read: it is no regular file.")
        if path.stat().st_size > _MAX_SIZE:
            raise RecipeError(str(path), [f"  has more than {_MAX_SIZE:,} bytes; is it a recipe?"])
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            str(path), [f"  byte {error.start}: not UTF-8 text; a recipe is a YAML file"]
        ) from error
    raw = parse_sections(text, str(path))
    folder = _without_links(path.parent)
    move_paths(
        raw,
        lambda name: os.path.normpath(folder / name),
        lambda name: (folder / name).exists(),
    )
    return raw


def _without_links(folder: Path) -> Path:
    """Return the folder that a linked one leads to; `..` in a recipe starts there."""
    real = os.path.realpath(folder)
    return folder if real == os.path.abspath(folder) else Path(os.path.relpath(real))


def _remove_targets(raw: dict[str, Any]) -> None:
    """Remove the file's target, which a flag replaces even if it gives the other kind."""
    if isinstance(raw.get("budget"), dict):
        for field in _TARGETS:
            raw["budget"].pop(field, None)


def _split_by_target(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one raw recipe for each target, if the budget has a list of them."""
    budget = raw.get("budget")
    if isinstance(budget, dict):
        for field in _TARGETS:
            targets = budget.get(field)
            if targets and isinstance(targets, list):
                return [{**raw, "budget": {**budget, field: target}} for target in targets]
    return [raw]


def _origin(path: Path | None, from_flags: list[bool]) -> str:
    """Name what is at fault, in words: the file, the command line, or both."""
    if path is None or all(from_flags):
        return "The command line"
    return f"{path} with the flags" if any(from_flags) else str(path)


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every field by its dotted name. Keyword arguments stay one value."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value and key != "kwargs":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flatten_absolute(recipe: Recipe) -> dict[str, Any]:
    raw = recipe.model_dump()
    move_paths(raw, os.path.abspath, os.path.exists)
    return _flatten(raw)
