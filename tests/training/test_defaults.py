"""Training settings that a recipe leaves open."""

from __future__ import annotations

from typing import Any

import pytest

from ddqcli.recipe.schema import Recipe
from ddqcli.training.defaults import with_defaults


def filled(steps: int, batch_size: int, **train: Any) -> tuple[str, float | None, str]:
    recipe = with_defaults(Recipe.model_validate({"train": train}), steps, batch_size)
    return recipe.train.optimizer, recipe.train.lr, recipe.train.batch_norm


@pytest.mark.parametrize(
    ("steps", "batch_size", "expected"),
    [
        (0, 128, ("adamw", 1e-4, "held")),
        (1562, 128, ("adamw", 1e-4, "held")),  # 199,936 samples
        (1563, 128, ("sgd", 0.01, "batch")),
        (6250, 32, ("sgd", 0.01, "batch")),  # exactly 200,000
        (10_000, 31, ("sgd", 0.01, "held")),
        (1_000_000, 1, ("sgd", 0.01, "held")),
    ],
)
def test_a_run_over_many_samples_trains_by_sgd_on_batch_statistics(
    steps: int, batch_size: int, expected: tuple[str, float, str]
) -> None:
    assert filled(steps, batch_size) == expected


@pytest.mark.parametrize("steps", [10, 10_000])
def test_settings_of_the_recipe_stay(steps: int) -> None:
    settings = {"optimizer": "sgd", "lr": 0.3, "batch_norm": "batch"}
    assert filled(steps, 64, **settings) == ("sgd", 0.3, "batch")
    settings = {"optimizer": "adamw", "lr": 0.3, "batch_norm": "held"}
    assert filled(steps, 64, **settings) == ("adamw", 0.3, "held")


def test_the_learning_rate_fits_the_optimizer() -> None:
    assert filled(10, 64, optimizer="sgd") == ("sgd", 0.01, "held")
    assert filled(10_000, 64, optimizer="adamw") == ("adamw", 1e-4, "batch")


def test_all_other_settings_stay() -> None:
    recipe = Recipe.model_validate({"name": "a", "train": {"epochs": 3, "seed": 7}})
    after = with_defaults(recipe, 10, 64)
    left_open = {"optimizer", "lr", "batch_norm", "bin_regularization"}
    assert after.model_dump(exclude={"train"}) == recipe.model_dump(exclude={"train"})
    assert after.train.model_dump(exclude=left_open) == recipe.train.model_dump(exclude=left_open)
