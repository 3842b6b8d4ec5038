"""Defaults of training settings that depend on the method, and on how much data a run sees."""

from __future__ import annotations

from ddqcli.recipe.schema import Recipe

MANY_SAMPLES = 200_000  # training samples that a run sees, repeats included
LARGE_BATCH = 32
SDQ_BIN_REGULARIZATION = 0.1  # the best in SDQ's Table 4
LEARNING_RATES = {"sgd": 0.01, "adamw": 1e-4}


def with_defaults(recipe: Recipe, steps: int, batch_size: int) -> Recipe:
    """Return the recipe with the training settings filled in that depend on the run.

    A long run recovers from noisy gradients and batch statistics, and ends better with them. Short
    runs of SGD ended below their start on most networks that others trained, and batch statistics
    cost up to 12 points (recipes/evidence). AdamW's step size does not depend on the scale of the
    gradients, and held statistics keep the function that the network has.
    """
    train = recipe.train
    long_run = steps * batch_size >= MANY_SAMPLES
    optimizer, batch_norm = train.optimizer, train.batch_norm
    if optimizer == "auto":
        optimizer = "sgd" if long_run else "adamw"
    if batch_norm == "auto":
        batch_norm = "batch" if long_run and batch_size >= LARGE_BATCH else "held"
    lr = LEARNING_RATES[optimizer] if train.lr is None else train.lr
    bin_regularization = train.bin_regularization
    if bin_regularization is None:
        bin_regularization = SDQ_BIN_REGULARIZATION if recipe.method == "sdq" else 0.0
    filled = train.model_copy(
        update={
            "optimizer": optimizer,
            "batch_norm": batch_norm,
            "lr": lr,
            "bin_regularization": bin_regularization,
        }
    )
    return recipe.model_copy(update={"train": filled})
