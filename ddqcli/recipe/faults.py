"""Pydantic's validation errors as one line each: the field's path, its value, what is allowed."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from pydantic_core import ErrorDetails

from ddqcli.formatting import did_you_mean
from ddqcli.recipe.schema import Override, Recipe

_SHORT = reprlib.Repr()  # a faulty value may be of any size
_SHORT.maxstring = _SHORT.maxother = 60


def short_repr(value: Any) -> str:
    """Return the `repr` of a value, shortened."""
    return _SHORT.repr(value)


def field_path(error: ErrorDetails) -> str:
    """Return the dotted name of the field at fault, such as `overrides.0.bits`."""
    return ".".join(str(part) for part in error["loc"])


def describe_fault(error: ErrorDetails) -> str:
    """Return one line such as `  train.lr = -1: input should be greater than 0`."""
    path, value = field_path(error), error["input"]
    if error["type"] == "extra_forbidden":
        known = sorted(_fields(error["loc"][:-1]))
        section, _, name = path.rpartition(".")
        meant = did_you_mean(name, known, prefix=f"{section}." if section else "")
        return f"  {path}: unknown field" + (meant or f"; known here: {', '.join(known)}")
    if error["type"] == "model_type":
        known = _fields(error["loc"])
        return f"  {path} = {short_repr(value)}: is a section; known in it: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict) else f" = {short_repr(value)}"
    return f"  {path or 'recipe'}{shown}: {message[0].lower()}{message[1:]}{_remedy(error)}"


def _remedy(error: ErrorDetails) -> str:
    """Return what was meant by a value of the wrong kind, if that is likely."""
    value = error["input"]
    if error["type"] == "literal_error":
        return did_you_mean(str(value), re.findall("'([^']+)'", error["ctx"]["expected"]))
    if error["type"] == "list_type" and isinstance(value, int | float):
        return f"; write [{value}]"
    return ""


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    """Return the names of the fields in the section at `loc`."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, str):
            section = Override if part == "overrides" else section.model_fields[part].annotation
    return list(section.model_fields)
