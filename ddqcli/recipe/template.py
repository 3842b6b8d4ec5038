"""A new recipe as YAML: the values at hand, and the most used keys with defaults as comments.

Comments are the descriptions of the fields in schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ddqcli.recipe.schema import Recipe

_MOST_USED = {
    "model": ("checkpoint", "arch", "kwargs"),
    "data": ("source", "mean", "std", "batch_size"),
    "budget": ("target_bits", "target_size"),
    "weights": ("max_bits", "min_bits", "granularity"),
    "activations": ("bits",),
    "train": ("epochs", "lr", "device", "seed"),
}
_WIDTH = 100
_END = "\n...\n"  # that PyYAML writes after a scalar


def commented_recipe(values: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Return a recipe with `values` by dotted name, such as `model.arch`.

    `notes` are comments at its top.
    """
    paragraphs = [[f"# {note}" for note in notes]]
    for section, names in _MOST_USED.items():
        fields: Mapping[str, Any] = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        given = [key.partition(".")[2] for key in values if key.startswith(f"{section}.")]
        lines = [f"{section}:" if given else f"# {section}:"]
        for name in dict.fromkeys([*names, *given]):
            field = fields[name]
            is_given = name in given
            value = values[f"{section}.{name}"] if is_given else field.get_default()
            lines += _lines(name, value, field.description or "", is_given)
        paragraphs.append(lines)
    return "\n\n".join("\n".join(lines) for lines in paragraphs) + "\n"


def _lines(name: str, value: Any, description: str, is_given: bool) -> list[str]:
    """Return `  name: value  # description`, all of it a comment unless it is given.

    A long description stands in a line above.
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    line = f"{'' if is_given else '# '}  {name}: {text.removesuffix(_END).strip()}"
    first_sentence = " ".join(description.split()).split(". ")[0].rstrip(".")
    comment = f"# {first_sentence.replace('None', 'null')}"
    if len(line) + len(comment) + 2 <= _WIDTH:
        return [f"{line}  {comment}"]
    return [f"{'' if is_given else '# '}  {comment}", line]
