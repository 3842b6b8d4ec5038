"""Relative paths in a recipe: the checkpoint, and the files of factories and data."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_PATH_FIELDS = (
    "model.checkpoint",
    "model.arch",
    "data.source",
    "train.teacher.checkpoint",
    "train.teacher.arch",
)


def move_paths(
    raw: dict[str, Any], move: Callable[[str], str], exists: Callable[[str], bool]
) -> None:
    """Apply `move` to every relative path in a raw recipe, in place.

    `nets.py:factory` holds a path. ROOT in `DATASET:ROOT` is one if it `exists`; otherwise the
    text may be `package.module:factory`.
    """
    for name in _PATH_FIELDS:
        *sections, field = name.split(".")
        values: Any = raw
        for section in sections:
            values = values.get(section) if isinstance(values, dict) else None
        text = values.get(field) if isinstance(values, dict) else None
        if not isinstance(text, str):
            continue
        head, colon, tail = text.partition(":")
        if head.endswith(".py") or (not colon and field != "arch"):
            values[field] = _moved(head, move) + colon + tail
        elif field == "source" and exists(tail):
            values[field] = f"{head}:{_moved(tail, move)}"


def _moved(path: str, move: Callable[[str], str]) -> str:
    expanded = os.path.expanduser(path)
    return expanded if not path or os.path.isabs(expanded) else move(path)
