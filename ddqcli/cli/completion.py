"""Values that the shell offers on Tab: recipe keys for `--set`, architectures for `--arch`.

Torch takes a second to import, so torchvision's names are read from its files.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddqcli.formatting import natural_sort_key

_REGISTERED = re.compile(r'^@register_model\((?:name="(\w+)")?\)$.*?^def (\w+)', re.M | re.S)


def recipe_keys(incomplete: str) -> list[tuple[str, str]]:
    """Return each key that begins like this, with `=`, and its description."""
    from ddqcli.recipe.schema import Recipe

    return [pair for pair in _keys(Recipe) if pair[0].startswith(incomplete)]


def architectures(incomplete: str) -> list[str]:
    """Return the names of torchvision's classifiers that begin like this."""
    return [name for name in torchvision_names() if name.startswith(incomplete)]


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers; none where it is not installed."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    texts = [
        path.read_text(encoding="utf-8")
        for folder in folders or ()
        for path in Path(folder, "models").glob("*.py")
    ]
    names = [given or name for text in texts for given, name in _REGISTERED.findall(text)]
    return sorted(names, key=natural_sort_key)


def _keys(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key in a section of the recipe, in its order."""
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _keys(field.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}=", " ".join((field.description or "").split())
