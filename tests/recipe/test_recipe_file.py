"""Recipe files are found, read with flags over them, written and compared."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_files import load_recipe, written

from ddqcli.errors import RecipeError
from ddqcli.recipe.file import differences, dump_recipes, find_recipe
from ddqcli.recipe.schema import Recipe


def test_without_file_and_flags_every_field_has_its_default() -> None:
    assert load_recipe(None) == Recipe()


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "\ufefftrain:\n", "---\n"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_recipe(written(tmp_path, text)) == Recipe()


@pytest.mark.parametrize(
    ("written_as", "flip"), [("true", True), ("false", False), ("auto", "auto")]
)
def test_flips_are_wanted_or_not_or_left_to_the_model(
    tmp_path: Path, written_as: str, flip: Any
) -> None:
    recipe = load_recipe(written(tmp_path, f"data: {{flip: {written_as}}}"))
    assert (type(recipe.data.flip), recipe.data.flip) == (type(flip), flip)
    assert load_recipe(written(tmp_path, dump_recipes([recipe], tmp_path))) == recipe


def test_flags_win_over_the_file_and_over_its_other_target(tmp_path: Path) -> None:
    path = written(tmp_path, "budget: {target_bits: 4}\ntrain: {lr: 0.1, epochs: 3}")
    recipe = load_recipe(path, {"train.lr": 0.2, "budget.target_size": "10kB"})
    assert (recipe.train.lr, recipe.train.epochs) == (0.2, 3)
    assert (recipe.budget.target_bits, recipe.budget.target_size) == (None, "10kB")
    assert load_recipe(path, {"budget.target_size": None}).budget.target_bits == 4
    for flags in itertools.permutations(
        [("budget.target_size", "10kB"), ("budget.target_bits", 3)]
    ):
        with pytest.raises(RecipeError, match="are both given; give one"):
            load_recipe(path, dict(flags))


def test_keywords_may_hold_anything_that_json_can(tmp_path: Path) -> None:
    kwargs = {"a": [1, 2.5, None, True], "b": {"c": "text", "d": {}}, "num_classes": 10}
    path = written(
        tmp_path, yaml.safe_dump({"model": {"kwargs": kwargs}, "data": {"kwargs": kwargs}})
    )
    assert load_recipe(path).model.kwargs == kwargs
    assert load_recipe(path, {"model.kwargs.num_classes": 7}).model.kwargs["num_classes"] == 7


def test_a_plain_number_of_bytes_is_a_size_in_yaml_too(tmp_path: Path) -> None:
    assert (
        load_recipe(written(tmp_path, "budget: {target_size: 150000}")).budget.target_size
        == "150000"
    )


def test_differences_name_the_field_and_both_values_and_see_through_paths(tmp_path: Path) -> None:
    one = load_recipe(
        None, {"train.lr": 0.01, "model.checkpoint": str(tmp_path / "m.pt"), "model.kwargs.a": 1}
    )
    other = load_recipe(
        None, {"train.lr": 0.02, "model.checkpoint": os.path.relpath(tmp_path / "m.pt")}
    )
    assert differences(one, one) == []
    assert differences(one, other) == ["model.kwargs: {'a': 1}, now {}", "train.lr: 0.01, now 0.02"]


def test_the_recipe_of_the_working_folder_comes_before_the_checkpoint_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("models/m.pt")) is None
    written(tmp_path / "models", "name: there")
    assert find_recipe(Path("models/m.pt")) == Path("models/ddq.yaml")
    written(tmp_path, "name: here")
    assert find_recipe(Path("models/m.pt")) == Path("ddq.yaml")


def test_every_default_survives_being_written_and_read(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, dump_recipes([Recipe()], tmp_path))) == Recipe()
