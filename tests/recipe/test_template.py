"""The recipe of `ddq init`: defaults are comments, and descriptions come from the schema."""

from __future__ import annotations

import re

import yaml

from ddqcli.recipe.schema import Recipe
from ddqcli.recipe.template import commented_recipe

VALUES = {
    "model.checkpoint": "a: odd, #name.pt",
    "model.arch": "net.py:build",
    "model.pickle": True,
    "data.mean": [0.5],
    "data.std": [0.25],
    "budget.target_bits": 4,
}


def test_the_values_are_set_and_all_else_keeps_its_default() -> None:
    raw = yaml.safe_load(commented_recipe(VALUES, ["a note"]))
    recipe = Recipe.model_validate(raw)
    expected = Recipe.model_validate(
        {
            "model": {"checkpoint": "a: odd, #name.pt", "arch": "net.py:build", "pickle": True},
            "data": {"mean": [0.5], "std": [0.25]},
            "budget": {"target_bits": 4},
        }
    )
    assert recipe == expected


def test_without_their_signs_the_comments_are_keys_with_their_defaults() -> None:
    text = commented_recipe({}, ["a note"])
    assert yaml.safe_load(text) is None
    lines = [line for line in text.splitlines() if re.match(r"# (\w+:$|  \w+: )", line)]
    raw = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    assert set(raw) == {"model", "data", "budget", "weights", "activations", "train"}
    assert Recipe.model_validate(raw) == Recipe()


def test_each_key_is_described_and_lines_are_short() -> None:
    text = commented_recipe(VALUES, [])
    for key, after in re.findall(r"^(?:# )?  (\w+): .*?(  # .+)?$", text, re.M):
        described = after or re.search(rf"^(?:# )?  # .+\n(?:# )?  {key}:", text, re.M)
        assert described, key
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r" $", text, re.M)


def test_every_field_of_a_recipe_is_described_or_a_section() -> None:
    def undescribed(section: type, path: str = "") -> list[str]:
        names = []
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                names += undescribed(inner, f"{path}{name}.")
            elif not field.description:
                names.append(path + name)
        return names

    assert undescribed(Recipe) == ["weights.levels", "gates.rule"]  # their values say it all
