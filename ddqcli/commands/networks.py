"""The networks of a run: the float model, its teacher, and the quantized copy with its budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddqcli import __version__
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.data.batches import tree_to_device
from ddqcli.data.load import Data
from ddqcli.data.source import list_names
from ddqcli.data.trees import sliced
from ddqcli.errors import UsageError
from ddqcli.qat.budget import ResolvedBudget, make_budget
from ddqcli.qat.convert import convert
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.network_copy import copy_network
from ddqcli.qat.reparametrized import make_plain
from ddqcli.qat.rules.registry import make_rule
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.encode_run import file_meta
from ddqcli.runs.evaluation import Course, Stage
from ddqcli.runs.report import Report, RunFacts, Source
from ddqcli.runs.run import FINAL, Run
from ddqcli.training import distributed
from ddqcli.training.device import place_model, resolve_device
from ddqcli.training.network_checks import refuse_scripted_parts
from ddqcli.training.report import build_report

Note = Callable[[str], None]


@dataclass(frozen=True)
class Teacher:
    """The network to distill from, in eval mode and without gradients."""

    model: nn.Module
    name: str
    sha256: str | None  # of its checkpoint; None if it is the float model


@dataclass(frozen=True)
class Models:
    """The float model, its teacher, its quantized copy, and the budget of that copy."""

    float_model: nn.Module  # the checkpoint's network in eval mode, without gradients
    teacher: Teacher
    quantized: QuantizedModel
    budget: ResolvedBudget
    device: torch.device
    source: Source


def load_and_convert(
    checkpoint_path: Path, recipe: Recipe, start: Run | None, introduce: Note
) -> Models:
    """Load the checkpoint and attach quantizers to a copy. Raises BudgetError if it cannot fit."""
    device = distributed.local_device(resolve_device(recipe.train.device))
    checkpoint = load_checkpoint(checkpoint_path, pickle=recipe.model.pickle)
    built = build_model(checkpoint, recipe.model.arch, recipe.model.kwargs)
    introduce(f"model: {built.note}; {checkpoint.note}")
    refuse_scripted_parts(built.model)
    model = place_model(built.model, device).eval()
    if plain := make_plain(model):
        introduce(f"weights that the network computes are made plain: {list_names(plain)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        introduce("all parameters of the network were frozen; they are trained")
        model.requires_grad_(True)
    trainable = copy_network(model)
    if start and start.report().is_trained:
        _load_trained_weights(trainable, start)
    quantized = convert(trainable, _without_seven_bits(recipe))
    source = Source(
        path=str(checkpoint_path), sha256=checkpoint.sha256, arch=built.arch, ddq=__version__
    )
    budget = make_budget(quantized, recipe, meta=_typical_meta(quantized, recipe, source))
    model.requires_grad_(False)
    teacher = _load_teacher(model, recipe, device, introduce)
    return Models(model, teacher, quantized, budget, device, source)


def _without_seven_bits(recipe: Recipe) -> Recipe:
    """Offer no 7 bits for an ONNX file, which stores them as 8."""
    if recipe.budget.target_format != "onnx" or recipe.rule == "paper":
        return recipe
    offered = [bits for bits in recipe.weights.bits_offered if bits != 7]
    weights = recipe.weights.model_copy(update={"bits_offered": offered})
    return recipe.model_copy(update={"weights": weights})


def _load_teacher(
    float_model: nn.Module, recipe: Recipe, device: torch.device, introduce: Note
) -> Teacher:
    """Return the recipe's teacher, by default the float model.

    Raises UsageError for a teacher that the recipe does not use.
    """
    section = recipe.train.teacher
    if section.checkpoint is None:
        return Teacher(float_model, "the float model", None)
    if recipe.train.distill.weight == 0:
        raise UsageError(
            "train.teacher is given, and train.distill.weight=0 trains without it; give one."
        )
    checkpoint = load_checkpoint(Path(section.checkpoint), pickle=recipe.model.pickle)
    built = build_model(checkpoint, section.arch, section.kwargs)
    introduce(f"teacher: {built.note}; {checkpoint.note}")
    model = place_model(built.model, device).eval().requires_grad_(False)
    return Teacher(model, section.checkpoint, checkpoint.sha256)


def _typical_meta(quantized: QuantizedModel, recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return what the file will say about the run, with typical numbers: as long, or longer."""
    typical = Course(
        stages=(
            Stage(name="float", accuracy=98.7654),
            Stage(name="quantized", accuracy=95.4321),
            Stage(name="compensated", accuracy=97.6543),
            Stage(name="trained", accuracy=98.2345),
        ),
        delivered="trained",
        looks=10,
        best_step=1234,
    )
    report = build_report(
        quantized,
        ResolvedBudget(limit=123_456, overhead_bytes=0, float_bytes=1_234_567, weights=0),
        accuracy=(98.7654, 97.6543),
        course=typical,
        source=source,
        run=RunFacts(steps=12_345, seed=recipe.train.seed, method=recipe.method),
    )
    margin = hashlib.sha256(source.sha256.encode()).hexdigest()  # some bytes more than typical
    return {**file_meta(report, recipe), "margin": margin}


def _load_trained_weights(model: nn.Module, run: Run) -> None:
    """Copy a finished run's float weights, and all else that stayed float, into the float model."""

    def copy_from(final: dict[str, Any]) -> None:
        trained = final["weights"] | final["floats"]  # shared tensors under one of their names
        trained |= final.get("unfolded", {})
        for name, value in model.state_dict().items():
            # A buffer that a forward pass resizes may differ in shape.
            if name in trained and trained[name].shape == value.shape:
                value.copy_(trained[name])

    run.parsed(FINAL, copy_from)


def first_report(models: Models, recipe: Recipe, warnings: Sequence[str] = ()) -> Report:
    """Return the report of the first bits, before any training; `warnings` are added to its own."""
    gates = make_rule(
        recipe.rule, models.quantized, recipe, models.budget, 0, recipe.data.batch_size
    )
    gates.start()
    warnings = [*warnings]
    if models.budget.limit is not None and gates.cost() > models.budget.limit:
        warnings.append(
            "these are the first bits; gates.rule=paper comes down to the budget while training"
            if recipe.gates.rule == "paper"
            else "the budget can be met only if some layers are never called, so that their inputs "
            "need no levels"
        )
    run = RunFacts(steps=0, seed=recipe.train.seed, method=recipe.method)
    return build_report(
        models.quantized,
        models.budget,
        accuracy=None,
        source=models.source,
        run=run,
        warnings=warnings,
    )


def with_format_budget(models: Models, recipe: Recipe, data: Data, introduce: Note) -> Models:
    """Return the models with a budget for the file that the target is for.

    Raises BudgetError if it cannot be met.
    """
    if recipe.budget.target_format != "onnx":
        return models
    from ddqcli.onnx.reserve import onnx_reserve

    about = {"ddq": __version__, "source": models.source.sha256}
    inputs, _ = next(iter(data.val.epoch(0)))
    example = tree_to_device(sliced(inputs, slice(2)), torch.device("cpu"))
    reserve: int = distributed.broadcast(
        onnx_reserve(models.quantized, models.float_model, example, about)
        if distributed.is_main()
        else None
    )
    budget = make_budget(models.quantized, recipe, meta=models.budget.meta, reserve=reserve)
    introduce(
        f"target: an ONNX file of {recipe.budget.target_size}; its nodes and floats take up to "
        f"{reserve:,} bytes, indices and levels may take {budget.limit:,}"
    )
    return replace(models, budget=budget)
