"""Recipe files, for the tests of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddqcli.recipe.file import load_recipes
from ddqcli.recipe.schema import Recipe


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ddq.yaml").write_text(text, encoding="utf-8")
    return folder / "ddq.yaml"


def load_recipe(path: Path | None, flags: dict[str, Any] | None = None) -> Recipe:
    (recipe,) = load_recipes(path, flags)
    return recipe
