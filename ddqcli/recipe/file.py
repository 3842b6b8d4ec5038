"""Recipes as files: a YAML file, with flags and `--set key=value` over it, read and written.

All faults are reported at once, each with its path, its value and what is allowed. Paths inside a recipe are relative
to the recipe's own folder.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ddqcli.errors import RecipeError, UsageError
from ddqcli.recipe.schema import Override, Recipe

RECIPE_NAME = "ddq.yaml"
_TARGETS = ("target_bits", "target_size")  # of a budget; either may be a list
_MOST_VALUES = 100_000  # in a recipe
_SHORT = reprlib.Repr()  # of a faulty value, which may be of any size
_SHORT.maxstring = _SHORT.maxother = 60


def find_recipe(checkpoint: Path | None) -> Path | None:
    """`ddq.yaml` in the working folder or beside the checkpoint, if there is one."""
    folders = [Path(), *([checkpoint.parent] if checkpoint else [])]
    return next(
        (folder / RECIPE_NAME for folder in folders if (folder / RECIPE_NAME).is_file()), None
    )


def dump_recipes(recipes: Sequence[Recipe], folder: Path) -> str:
    """Recipes that differ in their targets alone as one YAML text for a file in `folder`, every field written out."""
    raw = recipes[0].model_dump()
    if len(recipes) > 1:
        raw["budget"] |= {
            field: [getattr(r.budget, field) for r in recipes]
            for field in _TARGETS
            if raw["budget"][field]
        }
    _move_paths(raw, lambda path: os.path.relpath(path, folder), os.path.exists)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def differences(first: Recipe, second: Recipe) -> list[str]:
    """The fields in which two recipes differ, as `train.lr: 0.01, now 0.02`; a path may be written in several ways."""
    (before, whole), (after, whole_after) = (
        _flat_and_absolute(recipe) for recipe in (first, second)
    )
    return [
        f"{key}: {_SHORT.repr(before.get(key))}, now {_SHORT.repr(after.get(key))}"
        for key in sorted(before | after)
        if whole.get(key) != whole_after.get(key)
    ]


def _flat_and_absolute(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every field by its dotted name, as it is and with absolute paths."""
    raw, absolute = recipe.model_dump(), recipe.model_dump()
    _move_paths(absolute, os.path.abspath, os.path.exists)
    return _flattened(raw), _flattened(absolute)


def _flattened(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, dict) and value and key != "kwargs"
        flat |= _flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def load_recipes(path: Path | None, flags: dict[str, Any] | None = None) -> list[Recipe]:
    """The recipe in `path` (or none) with `flags`, {'train.epochs': 2, ...}, over it, once for each of its targets.

    Raises RecipeError, UsageError.
    """
    raw: dict[str, Any] = {}
    flags = flags or {}
    if path is not None:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UsageError(f"The recipe {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise RecipeError(
                str(path), [f"  byte {error.start}: not UTF-8 text; a recipe is a YAML file"]
            ) from error
        raw = _parse(text, str(path))
        _move_paths(
            raw,
            lambda name: os.path.normpath(path.parent / name),
            lambda name: (path.parent / name).exists(),
        )
    if any(flags.get(f"budget.{field}") is not None for field in _TARGETS) and isinstance(
        raw.get("budget"), dict
    ):
        for field in _TARGETS:
            raw["budget"].pop(
                field, None
            )  # a flag replaces the recipe's target, whichever of the two it was
    for key, value in flags.items():
        _assign(raw, key, value)
    recipes, details = [], []
    for each in _by_target(raw):
        try:
            recipes.append(Recipe.model_validate(each))
        except ValidationError as error:
            details += error.errors()
    if details:
        by_flag = [_key(detail) in flags for detail in details]
        source = (
            "The command line"
            if all(by_flag) or not path
            else f"{path}{' with the flags' * any(by_flag)}"
        )
        raise RecipeError(source, list(dict.fromkeys(_fault(detail) for detail in details)))
    targets = [recipe.budget.target for recipe in recipes]
    if twice := next((target for target in targets if targets.count(target) > 1), None):
        raise UsageError(f"The target {twice} is given twice.")
    return recipes


def _by_target(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe once for each of its targets, where its budget has a list of them."""
    budget = raw.get("budget")
    for field in _TARGETS if isinstance(budget, dict) else ():
        targets = budget.get(field)
        if targets and isinstance(targets, list):
            return [{**raw, "budget": {**budget, field: target}} for target in targets]
    return [raw]


class _Loader(yaml.SafeLoader):
    """YAML without a key that is given twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            key.value
            for key, _ in node.value
            if isinstance(key, yaml.ScalarNode) and key.value != "<<"
        ]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> dict[str, Any]:
    """The sections in the text of a recipe; one without content is left out. Raises RecipeError."""
    try:
        raw = yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
    ) as error:  # ValueError: a date such as 2024-99-99
        reason = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else " ".join(str(error).split())
        )
        raise RecipeError(source, [f"  not YAML: {reason}"]) from error
    if raw is not None and not isinstance(raw, dict):
        raise RecipeError(
            source, [f"  holds a {type(raw).__name__} where sections such as train: are expected"]
        )
    stack, seen = [raw], 0
    while stack:  # aliases can make a small file endless
        item = stack.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise RecipeError(
                source, [f"  holds more than {_MOST_VALUES:,} values once its aliases are expanded"]
            )
        stack += (
            [*item.keys(), *item.values()]
            if isinstance(item, dict)
            else item
            if isinstance(item, list)
            else []
        )
    return {key: value for key, value in (raw or {}).items() if value is not None}


def parse_assignment(text: str) -> tuple[str, Any]:
    """`train.lr=0.02` as ('train.lr', 0.02); the value is read as YAML. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise UsageError(f"--set {text} is not an assignment; write it as --set train.lr=0.02")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(
            f"--set {text}: the value is not YAML; write it as --set data.mean='[0.5, 0.5, 0.5]'"
        ) from error


def with_assignments(flags: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Flags and `--set` assignments together. Raises UsageError where two of them set the same field."""
    given = [*flags.items(), *map(parse_assignment, texts)]
    for (first, _), (second, _) in itertools.combinations(given, 2):
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            both = "is given twice" if first == second else f"and {second} are both given"
            raise UsageError(f"{first} {both} on the command line; give one.")
    return dict(given)


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, field = key.split(".")
    for section in sections:
        below = raw.get(section)
        if below is None:
            below = raw[section] = {}
        if not isinstance(below, dict):
            if section == sections[0] and not isinstance(below, list):
                return  # a fault of the recipe, which validation reports
            raise UsageError(
                f"{key} cannot be set: {section} is a {type(below).__name__}, which has no named fields."
            )
        raw = below
    raw[field] = value


def _move_paths(
    raw: dict[str, Any], move: Callable[[str], str], exists: Callable[[str], bool]
) -> None:
    """Apply `move` to the relative paths of the recipe; ROOT of DATASET:ROOT is one (and no factory) if it `exists`."""
    for section, field in (("model", "checkpoint"), ("model", "arch"), ("data", "source")):
        values = raw.get(section)
        text = values.get(field) if isinstance(values, dict) else None
        if not isinstance(text, str):
            continue
        head, colon, tail = text.partition(":")
        if head.endswith(".py") or (not colon and field != "arch"):
            values[field] = _moved(head, move) + colon + tail
        elif field == "source" and exists(tail):
            values[field] = f"{head}:{_moved(tail, move)}"


def _moved(path: str, move: Callable[[str], str]) -> str:
    whole = os.path.expanduser(path)
    return whole if not path or os.path.isabs(whole) else move(path)


def _key(detail: Any) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _fault(detail: Any) -> str:
    """One fault of pydantic's as one line: path, value, what is allowed."""
    path, value = _key(detail), detail["input"]
    if detail["type"] == "extra_forbidden":
        known = sorted(_fields(detail["loc"][:-1]))
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"  {path}: unknown field; {hint}"
    if detail["type"] == "model_type":
        return f"  {path} = {_SHORT.repr(value)}: is a section; known in it: {', '.join(_fields(detail['loc']))}"
    message = detail["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict) else f" = {_SHORT.repr(value)}"
    return f"  {path or 'recipe'}{shown}: {message[0].lower()}{message[1:]}"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    """The fields of the section at a place in the recipe."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, str):
            section = Override if part == "overrides" else section.model_fields[part].annotation
    return list(section.model_fields)
