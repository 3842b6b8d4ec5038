"""Before training: the data, the float model's baseline, and what of them cannot be trained on."""

from __future__ import annotations

import math

import torch
from torch import nn

from ddqcli.commands.networks import Models, Note, with_format_budget
from ddqcli.data.load import Data, load_data
from ddqcli.data.source import list_names
from ddqcli.data.trees import call, copied
from ddqcli.errors import UsageError
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import Run
from ddqcli.training import distributed
from ddqcli.training.check_inputs import input_warning
from ddqcli.training.detect_augmentation import DetectedAugmentation, detect_augmentation
from ddqcli.training.device import make_contiguous, needs_contiguous
from ddqcli.training.distillation import (
    check_distillable,
    check_same_outputs,
    distillation_weight,
    flips_at_random,
    matched,
)
from ddqcli.training.evaluate import evaluate_all
from ddqcli.training.features import check_features
from ddqcli.training.listener import Listener
from ddqcli.training.network_checks import refuse_written_weights
from ddqcli.training.run_state import FloatBaseline, RunIdentity
from ddqcli.training.same_run import first_outputs
from ddqcli.training.trial import try_data
from ddqcli.training.unlabelled import is_labelled, with_float_targets
from ddqcli.training.user_errors import explain_user_errors

CANNOT_RUN = "The model cannot run on these data"


def data_with_targets(recipe: Recipe, models: Models, introduce: Note) -> Data:
    """Load the data; without labels, the float model's outputs are the targets."""
    seed, shard = recipe.train.seed, distributed.shard()
    data = load_data(
        recipe.data,
        seed=seed,
        device=models.device,
        shard=shard,
        max_steps=recipe.train.max_steps,
    )
    introduce(f"data: {data.note}")
    if is_labelled(data):
        return data
    introduce("the data have no labels: the targets are the outputs of the float model")
    return with_float_targets(data, models.float_model)


def fit_memory_format(models: Models, data: Data, introduce: Note) -> None:
    """Leave the channels_last format if the network, loss or metric cannot work with it."""
    if not needs_contiguous(models.float_model, data):
        return
    for model in {models.float_model, models.teacher.model, models.quantized.model}:
        make_contiguous(model)
    introduce(
        "tensors stay contiguous, since the network, loss or metric needs it for a view; with "
        "reshape in its place, convolutions may be faster"
    )


def try_run(models: Models, recipe: Recipe, introduce: Note) -> tuple[Models, list[str]]:
    """Raise what a run would raise at its first batches.

    Returns the models with their budget, and a warning of the inputs, if any.
    """
    data = data_with_targets(recipe, models, introduce)
    with explain_user_errors(CANNOT_RUN, UsageError, recipe):
        fit_memory_format(models, data, introduce)
        models = with_format_budget(models, recipe, data, introduce)
        accuracy = try_data(models.float_model, data, recipe.train.distill)
        value = data.judged_by.text(accuracy, " ")
        introduce(f"float {data.judged_by.name} on one batch: {value}")
        warning = warning_of_inputs(models, data, math.nan, recipe)  # a batch may be of one class
        check_distillation(models, data, recipe, introduce)
        refuse_written_weights(models.quantized, models.float_model, data)
    return models, [warning] if warning else []


def saved_baseline(start: Run | None, identity: RunIdentity) -> FloatBaseline | None:
    """Return the baseline that a run of the same checkpoint and data has measured, on every rank.

    Raises UsageError if its checkpoint or data differ.
    """
    if start is None:
        return None
    state = start.load_resume_state(identity.shared_state()) if distributed.is_main() else None
    baseline: FloatBaseline | None = distributed.broadcast(
        FloatBaseline.from_state(state) if state else None
    )
    return baseline


def measure_baseline(
    float_model: nn.Module, data: Data, recipe: Recipe, here: dict[str, str], listener: Listener
) -> FloatBaseline:
    """Evaluate the float model, and detect how its training images were augmented."""
    accuracy, *others = evaluate_all(float_model, data, on_progress=listener.progress)
    labels = distillation_weight(recipe.train.distill, data) < 1
    detected = detect_augmentation(float_model, data, recipe.data, labels=labels)
    return FloatBaseline(
        accuracy,
        distributed.broadcast(detected),
        here,
        *first_outputs(float_model, data),
        tuple(others),
    )


def warning_of_inputs(models: Models, data: Data, accuracy: float, recipe: Recipe) -> str | None:
    """Return a warning if the data do not fit the float model; None on ranks other than 0."""
    if not distributed.is_main():
        return None
    section = recipe.data
    normalization = f"data.mean {section.mean}, data.std {section.std}"
    if data.augment is None:
        normalization = "your factory's"
    return input_warning(models.float_model, data, accuracy, normalization)


def apply_augmentation(data: Data, detected: DetectedAugmentation, introduce: Note) -> None:
    detected.apply(data)
    if detected.fill is not None:
        introduce(f"crops are padded with {detected.fill}: it fits the model's BatchNorm best")
    if detected.flip is not None:
        flipped, well = (
            ("flipped at random", "about as well")
            if detected.flip
            else ("not flipped", "less well")
        )
        introduce(f"images are {flipped}: the model recognizes flipped images {well}")


def check_distillation(models: Models, data: Data, recipe: Recipe, introduce: Note) -> None:
    """Raise DataError if the recipe distills from outputs that are not finite.

    Raises UsageError if a teacher's outputs are not those of the model, or if it is not used.
    """
    weight, teacher = distillation_weight(recipe.train.distill, data), models.teacher
    if not weight:
        if teacher.sha256 is not None:
            raise UsageError(
                "train.teacher is given, but these data bring their own loss; set "
                "train.distill.weight to distill."
            )
        if recipe.train.distill.layers:
            raise UsageError("train.distill.layers are given, and train.distill.weight is 0.")
        return
    inputs, targets = next(iter(data.val.epoch(0)))
    with torch.no_grad():
        output = call(models.float_model, copied(inputs))
        check_distillable(output)
        if teacher.sha256 is not None:
            check_same_outputs(output, call(teacher.model, copied(inputs)), teacher.name)
        if recipe.train.distill.layers:
            check_features(models.float_model, teacher.model, recipe.train.distill.layers, inputs)
    views = ", mean of each image and its flip" if flips_at_random(data) else ""
    temperature = recipe.train.distill.temperature
    has_scores = any(axis is not None for *_, axis in matched(output, output, targets))
    softened = f", temperature {temperature:g}" if has_scores and not data.distill else ""
    softened += ", by your own function" if data.distill else ""
    if layers := recipe.train.distill.layers:
        softened += f", also of the outputs of {list_names(layers)}"
    introduce(f"loss: {100 * weight:g} % distillation from {teacher.name}{views}{softened}")
