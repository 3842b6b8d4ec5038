"""YAML for recipes: refuses duplicate keys, aliases that expand without end, and Python objects."""

from __future__ import annotations

import copy
from collections import Counter
from functools import lru_cache
from typing import Any

import yaml

from ddqcli.errors import RecipeError

_MAX_VALUES = 100_000  # in a recipe
YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError)  # ValueError: a date like 2024-99-99


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml comes without stubs
    """A safe loader that refuses duplicate keys, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if "<<" in keys:  # nested merges make a small file endless
            raise yaml.constructor.ConstructorError(
                None, None, "<< merges have no use in a recipe", node.start_mark
            )
        key, count = next(iter(Counter(keys).most_common(1)), ("", 0))
        if count > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key} is given twice", node.start_mark
            )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises one of YAML_ERRORS."""
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=4)  # a command reads the recipe of its run several times
def _parsed(text: str) -> Any:
    return yaml.load(text, _Loader)


def parse_sections(text: str, source: str) -> dict[str, Any]:
    """Return the sections of a recipe, without empty ones. Raises RecipeError, naming `source`."""
    try:
        raw = load_yaml(text)
    except YAML_ERRORS as error:
        too_deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if too_deep else " ".join(str(error).split())
        raise RecipeError(source, [f"  not YAML: {reason}"]) from error
    if raw is not None and not isinstance(raw, dict):
        kind = type(raw).__name__
        raise RecipeError(source, [f"  holds a {kind} where sections such as train: are expected"])
    if _has_too_many_values(raw):
        raise RecipeError(
            source, [f"  holds more than {_MAX_VALUES:,} values once its aliases are expanded"]
        )
    return {key: value for key, value in (raw or {}).items() if value is not None}


def _has_too_many_values(raw: Any) -> bool:
    """True beyond _MAX_VALUES values; aliases can make a small file endless."""
    stack, count = [raw], 0
    while stack and count <= _MAX_VALUES:
        item = stack.pop()
        count += 1
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item
    return count > _MAX_VALUES
