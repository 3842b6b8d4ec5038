"""`--set key=value` and flags: values for single fields of a recipe, by their dotted names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from ddqcli.errors import UsageError
from ddqcli.recipe.yaml_text import YAML_ERRORS, load_yaml


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return `train.lr=0.02` as ('train.lr', 0.02); the value is YAML. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise UsageError(f"--set {text} is not an assignment; write it as --set train.lr=0.02")
    try:
        return key.strip(), load_yaml(value)
    except YAML_ERRORS as error:
        raise UsageError(
            f"--set {text}: the value is not YAML; write it as --set data.mean='[0.5, 0.5, 0.5]'"
        ) from error


def with_assignments(flags: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return flags and `--set` assignments as one dict.

    Raises UsageError if two of them set the same field, or a section and a field in it.
    """
    values = [*flags.items(), *map(parse_assignment, texts)]
    for (first, _), (second, _) in itertools.combinations(values, 2):
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            both = "is given twice" if first == second else f"and {second} are both given"
            raise UsageError(f"{first} {both} on the command line; give one.")
    return dict(values)


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the field with the dotted name `key` in a raw recipe, in place.

    Raises UsageError if a value on the way to it has no named fields. A faulty section is left
    alone: validation reports it.
    """
    *sections, field = key.split(".")
    for section in sections:
        inner = raw.get(section)
        if inner is None:
            inner = raw[section] = {}
        if not isinstance(inner, dict):
            if section == sections[0] and not isinstance(inner, list):
                return
            raise UsageError(
                f"{key} cannot be set: {section} is a {type(inner).__name__}, which has no named "
                "fields."
            )
        raw = inner
    raw[field] = value
