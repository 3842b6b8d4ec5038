"""The torch files of a run, and the check that a training state may be resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ddqcli.errors import UsageError
from ddqcli.runs.files import write_atomic


def save_torch(path: Path, state: dict[str, Any], owner: str) -> None:
    """Write a state atomically. Raises UsageError or DDQError if the disk refuses.

    `owner` is the run's token.
    """
    import torch

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(state, file)

    write_atomic(path, write, owner=owner)


def load_torch(path: Path) -> dict[str, Any]:
    """Read a state onto the CPU; no code in it runs.

    Raises if any bit is damaged, or if a tensor claims to be larger than the file.
    """
    import torch

    from ddqcli.checkpoint.torch_load import check_zip

    size = os.stat(path).st_size
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    check_zip(path, size)
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(state, dict):
        raise TypeError(f"{path} holds a {type(state).__name__}")
    stack: list[Any] = [state]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor) and value.numel() * value.element_size() > size:
            raise ValueError(f"a tensor of shape {list(value.shape)} is larger than {path}")
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            stack += value.values() if isinstance(value, dict) else value
    return state


def check_resumable(state: dict[str, Any], expected: dict[str, Any], recipe_path: Path) -> None:
    """Raise UsageError, naming the difference, if a state was saved under other conditions.

    `expected` is compared key by key: the `format` of the state, the checkpoint's `sha256`, that of
    the `teacher`, the text of the `recipe`, the number of `steps`, and the fingerprint of the
    `data`.
    """
    for key, now in expected.items():
        then = state.get(key)
        if then != now:
            difference = _describe_difference(key, now, then, recipe_path)
            raise UsageError(
                f"{difference} that {recipe_path.parent} was begun with; go back to that, or begin "
                "a new run."
            )


def _describe_difference(key: str, now: Any, then: Any, recipe_path: Path) -> str:
    if key == "format":
        formats = f"training states of format {now}, then {then}"
        return f"This version of ddq is not the one ({formats})"
    if key in ("sha256", "teacher"):
        what = "checkpoint" if key == "sha256" else "teacher's checkpoint"
        return f"The {what} is not the one (SHA-256 {now!s:.12}…, then {then!s:.12}…)"
    if key == "steps":
        return f"The data are not the ones ({now} steps, then {then})"
    if key == "data":
        return "The data, though as many, are not the ones"
    return f"{recipe_path} is not the recipe ({_changed_lines(str(then), now)})"


def _changed_lines(then: str, now: str) -> str:
    """Return the lines in which two texts of a recipe differ, as `lr: 0.01, now lr: 0.02`."""
    pairs = zip(then.splitlines(), now.splitlines(), strict=False)
    changed = [f"{a.strip()}, now {b.strip()}" for a, b in pairs if a != b]
    return "; ".join(changed[:3]) or "it has more or fewer lines"
