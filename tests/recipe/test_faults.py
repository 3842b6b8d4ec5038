"""Faults of a recipe are reported at once, each with path, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_files import load_recipe, written

from ddqcli.errors import RecipeError


def test_all_faults_come_at_once_each_with_path_value_and_what_is_allowed(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        train: {lr: -1, optimiser: sgd, epochs: many}
        data: {flip: maybe, mean: 0.5}
        weights: {levels: leraned, max_bits: 12}
        budget: {target_size: 12 apples}
        overrides: [{match: "*", bits: 4}, {type: Conv2d, bitz: 4}]
        """,
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    head, *faults = str(caught.value).splitlines()
    assert head == f"{path} has 9 faults:"
    assert sorted(caught.value.faults) == sorted(faults)
    for fault in (
        "  train.lr = -1: input should be greater than 0",
        "  train.optimiser: unknown field; did you mean train.optimizer?",
        "  train.epochs = 'many': input should be a valid integer, "
        "unable to parse string as an integer",
        "  data.flip = 'maybe': input should be True, False or 'auto'",
        "  weights.levels = 'leraned': input should be 'learned', 'uniform' or 'power_of_two'; "
        "did you mean learned?",
        "  data.mean = 0.5: input should be a valid list; write [0.5]",
        "  weights.max_bits = 12: input should be less than or equal to 8",
        "  budget.target_size = '12 apples': '12 apples' is not a size; "
        "write 150kB, 1.8MB, 96KiB or 12%",
        "  overrides.1.bitz: unknown field; did you mean overrides.1.bits?",
    ):
        assert fault in faults


def test_a_field_unlike_any_other_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"budget\.xyz: unknown field; known here: count, target_bits, target_format, ",
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
