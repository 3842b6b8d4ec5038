"""Training settings that a recipe leaves to ddq, chosen by how much data a run sees."""

from __future__ import annotations

from ddqcli.recipe.schema import Recipe

MANY_SAMPLES = 200_000  # training samples seen in a run, repeats included
LARGE_BATCH = 32
LEARNING_RATES = {"auto": 1e-4, "sgd": 0.01, "adamw": 1e-4}


def with_defaults(recipe: Recipe, steps: int, batch_size: int) -> Recipe:
    """Return the recipe with optimizer, learning rate and BatchNorm mode filled in.

    A long run can follow noisy gradients and batch statistics far, to a better end. In a short one,
    SGD at a fixed learning rate ended below its start on most networks that others trained, and
    batch statistics cost up to 12 points (recipes/evidence). AdamW's step size does not depend on
    the scale of the gradients, and held statistics keep the float model's function.
    """
    train = recipe.train
    many = steps * batch_size >= MANY_SAMPLES
    optimizer = train.optimizer
    if optimizer == "auto":
        optimizer = "sgd" if many else "adamw"
    batch_norm = train.batch_norm
    if batch_norm == "auto":
        batch_norm = "batch" if many and batch_size >= LARGE_BATCH else "held"
    lr = LEARNING_RATES[optimizer] if train.lr is None else train.lr
    chosen = train.model_copy(update={"optimizer": optimizer, "batch_norm": batch_norm, "lr": lr})
    return recipe.model_copy(update={"train": chosen})
