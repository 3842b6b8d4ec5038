"""Recipes: what they may say, how faults are told, and what paths in them mean."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddqcli.errors import RecipeError, UsageError
from ddqcli.recipe.file import (
    differences,
    dump_recipes,
    find_recipe,
    load_recipes,
    parse_assignment,
)
from ddqcli.recipe.schema import Recipe
from ddqcli.recipe.size import parse_size


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ddq.yaml").write_text(text, encoding="utf-8")
    return folder / "ddq.yaml"


def load_recipe(path: Path | None, flags: dict[str, Any] | None = None) -> Recipe:
    (recipe,) = load_recipes(path, flags)
    return recipe


def test_without_file_and_flags_every_field_has_its_default() -> None:
    assert load_recipe(None) == Recipe()


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "\ufefftrain:\n", "---\n"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_recipe(written(tmp_path, text)) == Recipe()


def test_all_faults_come_at_once_each_with_path_value_and_what_is_allowed(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        train: {lr: -1, optimiser: sgd, epochs: many}
        data: {flip: maybe}
        weights: {levels: leraned, max_bits: 12}
        budget: {target_size: 12 apples}
        overrides: [{match: "*", bits: 4}, {type: Conv2d, bitz: 4}]
        """,
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    head, *faults = str(caught.value).splitlines()
    assert head == f"{path} has 8 faults:"
    assert sorted(caught.value.faults) == sorted(faults)
    for fault in (
        "  train.lr = -1: input should be greater than 0",
        "  train.optimiser: unknown field; did you mean optimizer?",
        "  train.epochs = 'many': input should be a valid integer, unable to parse string as an integer",
        "  data.flip = 'maybe': input should be True, False or 'auto'",
        "  weights.levels = 'leraned': input should be 'learned', 'uniform' or 'power_of_two'",
        "  weights.max_bits = 12: input should be less than or equal to 8",
        "  budget.target_size = '12 apples': '12 apples' is not a size; write 150kB, 1.8MB, 96KiB or 12%",
        "  overrides.1.bitz: unknown field; did you mean bits?",
    ):
        assert fault in faults


@pytest.mark.parametrize(
    ("written_as", "flip"), [("true", True), ("false", False), ("auto", "auto")]
)
def test_flips_are_wanted_or_not_or_left_to_the_model(
    tmp_path: Path, written_as: str, flip: Any
) -> None:
    recipe = load_recipe(written(tmp_path, f"data: {{flip: {written_as}}}"))
    assert (type(recipe.data.flip), recipe.data.flip) == (type(flip), flip)
    assert load_recipe(written(tmp_path, dump_recipes([recipe], tmp_path))) == recipe


def test_a_field_unlike_any_other_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"budget\.xyz: unknown field; known here: count, target_bits, target_size",
    ):
        load_recipe(written(tmp_path, "budget: {xyz: 1}"))


def test_a_fault_of_a_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {lr: 0.1}")
    with pytest.raises(RecipeError, match=r"^The command line has 1 fault"):
        load_recipe(path, {"train.lr": -1})
    path = written(tmp_path, "train: {lr: 0.1, epochs: -1}")
    with pytest.raises(RecipeError, match=r"ddq\.yaml with the flags has 2 faults"):
        load_recipe(path, {"train.lr": -1})


def test_a_flag_does_not_hide_a_faulty_section(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="train = 5: is a section; known in it: epochs, max_steps"
    ):
        load_recipe(written(tmp_path, "train: 5"), {"train.lr": 0.1})


def test_a_value_of_any_size_is_shown_short(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, f"train: {{lr: {'x' * 10_000}, epochs: [{'1,' * 5000}]}}"))
    assert len(str(caught.value)) < 600


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.02", ("train.lr", 0.02)),
        (
            "train.lr=2e-2",
            ("train.lr", "2e-2"),
        ),  # which YAML takes for text, and the recipe for a number
        ("data.mean=[0.5, 0.4, 0.3]", ("data.mean", [0.5, 0.4, 0.3])),
        ("model.kwargs.layer1_Width=3", ("model.kwargs.layer1_Width", 3)),
        ("name=a=b", ("name", "a=b")),
        ("weights.bias_bits=null", ("weights.bias_bits", None)),
    ],
)
def test_an_assignment_is_read_as_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_assignment(text) == expected
    assert isinstance(load_recipe(None, dict([expected])), Recipe)


@pytest.mark.parametrize(
    "text",
    ["", "=", "train.lr", "train..lr=1", "train lr=1", ".lr=1", "train.lr =[", "a=2026-99-99"],
)
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_assignment(text)


def test_keywords_may_hold_anything_that_json_can(tmp_path: Path) -> None:
    kwargs = {"a": [1, 2.5, None, True], "b": {"c": "text", "d": {}}, "num_classes": 10}
    path = written(
        tmp_path, yaml.safe_dump({"model": {"kwargs": kwargs}, "data": {"kwargs": kwargs}})
    )
    assert load_recipe(path).model.kwargs == kwargs
    assert load_recipe(path, {"model.kwargs.num_classes": 7}).model.kwargs["num_classes"] == 7


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("150kB", 150_000),
        ("1.8MB", 1_800_000),
        ("96KiB", 98_304),
        ("12%", 960),
        (".5kb", 500),
        (" 1 GB ", 10**9),
        ("7", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, 8000) == size


@pytest.mark.parametrize(
    "text", ["", "kB", "-1kB", "0", "0%", "1e3", "1 TB", "1.2.3kB", "12%%", "nan"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|less than one byte"):
        parse_size(text, 8000)


def test_a_plain_number_of_bytes_is_a_size_in_yaml_too(tmp_path: Path) -> None:
    assert (
        load_recipe(written(tmp_path, "budget: {target_size: 150000}")).budget.target_size
        == "150000"
    )


def test_paths_in_a_recipe_are_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "model: {checkpoint: m.pt, arch: 'nets/net.py:build'}\ndata: {source: images}"
    path = written(tmp_path / "a b", text)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("a b/ddq.yaml"))
    assert recipe.model.checkpoint == "a b/m.pt"
    assert recipe.model.arch == "a b/nets/net.py:build"
    assert recipe.data.source == "a b/images"
    monkeypatch.chdir(path.parent)
    assert load_recipe(Path("ddq.yaml")).model.checkpoint == "m.pt"


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("model: {arch: %s}", "resnet18"),
        ("model: {arch: %s}", "package.module:factory"),
        ("data: {source: %s}", "package.module:factory"),
        ("data: {source: %s}", "/data/images"),
        ("data: {source: %s}", "CIFAR10:/data"),
    ],
)
def test_what_is_no_relative_path_stays_as_it_is(tmp_path: Path, section: str, value: str) -> None:
    recipe = load_recipe(written(tmp_path, section % value))
    assert value in (recipe.model.arch, recipe.data.source)


def test_the_home_folder_has_its_short_name(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "data: {source: ~/images}")).data.source == str(
        Path.home() / "images"
    )


def test_the_root_of_a_data_set_is_beside_the_recipe_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "cifar").mkdir()
    assert (
        load_recipe(written(tmp_path, "data: {source: 'CIFAR10:cifar'}")).data.source
        == f"CIFAR10:{tmp_path / 'cifar'}"
    )


def test_flags_are_relative_to_the_working_folder(tmp_path: Path) -> None:
    assert (
        load_recipe(written(tmp_path, "name: x"), {"data.source": "images"}).data.source == "images"
    )


def test_a_resolved_recipe_means_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "else", "cifar"):
        Path(folder).mkdir()
    flags = {
        "model.checkpoint": "m.pt",
        "model.arch": "net.py:build",
        "data.source": "CIFAR10:cifar",
        "name": "é",
    }
    recipe = load_recipe(None, flags)
    Path("run/recipe.yaml").write_text(dump_recipes([recipe], Path("run")), encoding="utf-8")
    assert load_recipe(Path("run/recipe.yaml")) == recipe
    monkeypatch.chdir("else")
    seen = load_recipe(Path("../run/recipe.yaml"))
    assert seen.model.checkpoint == os.path.join("..", "m.pt")
    assert seen.data.source == f"CIFAR10:{os.path.join('..', 'cifar')}"


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


@pytest.mark.parametrize("key", ["train.lr.x", "overrides.0.bits"])
def test_a_flag_below_what_has_no_fields_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ddq.yaml"
    path.write_text("train: {lr: 0.1}\noverrides: [{type: Linear, bits: 8}]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be set"):
        load_recipe(path, {key: 3})
