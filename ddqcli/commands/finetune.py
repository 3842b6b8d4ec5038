"""`ddq finetune`: a trained model and a budget in, a run folder with the quantized model out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddqcli import __version__
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.commands.run_folder import record_code, run_folder
from ddqcli.data.batches import tree_to_device
from ddqcli.data.load import Data, load_data
from ddqcli.data.source import list_names
from ddqcli.data.source_files import fingerprint_of_files
from ddqcli.data.trees import call, copied, sliced
from ddqcli.errors import DDQError, UsageError
from ddqcli.qat.budget import ResolvedBudget, make_budget
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.network_copy import copy_network
from ddqcli.qat.reparametrized import make_plain
from ddqcli.qat.rules.registry import make_rule
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.encode_run import file_meta, with_file_size
from ddqcli.runs.evaluation import Accuracy, Course, Measured, Stage
from ddqcli.runs.report import Report, RunFacts, Source
from ddqcli.runs.run import FINAL, Run
from ddqcli.runs.trust import code_files
from ddqcli.training import distributed
from ddqcli.training.check_inputs import input_warning
from ddqcli.training.detect_augmentation import DetectedAugmentation, detect_augmentation
from ddqcli.training.device import place_model, resolve_device
from ddqcli.training.diagnostics import find_warnings
from ddqcli.training.distillation import (
    check_distillable,
    check_same_outputs,
    distillation_weight,
    flips_at_random,
    matched,
)
from ddqcli.training.evaluate import evaluate_all, probe
from ddqcli.training.features import check_features
from ddqcli.training.listener import Listener, SilentListener, main_listener
from ddqcli.training.network_checks import refuse_scripted_parts, refuse_written_weights
from ddqcli.training.report import build_report
from ddqcli.training.run_state import FloatBaseline, RunIdentity
from ddqcli.training.same_run import check_same_model, first_outputs, surroundings
from ddqcli.training.session import build_trainer, course, start_accuracy, total_steps, train
from ddqcli.training.trainer import Trainer
from ddqcli.training.trial import try_data
from ddqcli.training.unlabelled import is_labelled, with_float_targets
from ddqcli.training.user_errors import explain_user_errors

_CANNOT_RUN = "The model cannot run on these data"
_Note = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    A dry run leaves `run_dir` None; its report describes the run that would be trained.
    """

    run_dir: Path | None
    report: Report
    seconds: float  # that the command took; of a resumed run, since it was resumed

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        run_dir = None if self.run_dir is None else str(self.run_dir)
        return {"run_dir": run_dir, "seconds": round(self.seconds, 1), **self.report.data()}


def finetune(
    checkpoint_path: Path,
    recipe: Recipe,
    *,
    run: Run | None = None,
    run_dir: Path | None = None,
    start: Run | None = None,
    introduced: bool = False,
    dry_run: bool = False,
    listener: Listener | None = None,
) -> FinetuneResult:
    """Finetune a checkpoint as the recipe says. Raises DDQError and its children.

    Args:
        checkpoint_path: the float model.
        recipe: model, data, budget and training.
        run: an unfinished run to resume. Without it, a new one is made at `run_dir`.
        run_dir: folder of a new run; by default one under runs/.
        start: a finished run of the same checkpoint and data. If it was trained, training starts
            from its float weights. Baseline accuracy and distillation refer to the checkpoint.
        introduced: leave out the notes on model and data, which the listener has had before.
        dry_run: check model, budget and one batch of the data; train nothing.
        listener: receives notes, progress and metrics.
    """
    began = time.monotonic()
    listener = main_listener(listener)
    introduce = SilentListener().note if introduced else listener.note
    recipe = recipe.with_checkpoint(checkpoint_path)
    models = _load_and_convert(checkpoint_path, recipe, start, introduce)
    if models.budget.limit is None:
        introduce(
            f"no budget is given: weights take up to {recipe.weights.max_bits} bits, their "
            "maximum; give --target-bits 4 or --target-size 150kB"
        )
    if dry_run:
        models, warnings = _try_data(models, recipe, introduce)
        report = _first_report(models, recipe, warnings)
        return FinetuneResult(None, report, time.monotonic() - began)
    in_folder = run_folder(run, run_dir, recipe, introduce)
    with distributed.process_group(models.device), in_folder as run:
        data = _load_data(recipe, models, introduce)
        models = _for_format(models, recipe, data, introduce)
        record_code(run, recipe, introduce)
        listener.judged_by(data.judged_by)
        identity = RunIdentity(
            sha256=models.source.sha256,
            teacher=models.teacher.sha256,
            recipe=run.recipe_text(),
            steps=total_steps(recipe, data),
            data=data.fingerprint(),
            files=fingerprint_of_files(recipe.data.source),
        )
        here = surroundings(models.device, models.source.ddq, code_files(recipe))
        distributed.check_same(
            {
                "recipe": recipe.model_dump_json(),
                "checkpoint": f"{identity.sha256} {identity.teacher}",
                "data": f"{identity.data} {identity.files}",
                **{name: fact for name, fact in here.items() if name not in ("device", "threads")},
            }
        )
        start_baseline = _saved_baseline(start, identity)
        saved = distributed.broadcast(
            run.load_resume_state(identity.state()) if distributed.is_main() else None
        )
        known_baseline = FloatBaseline.from_state(saved) if saved else start_baseline
        with explain_user_errors(_CANNOT_RUN, UsageError, recipe):
            if known_baseline and (
                change := check_same_model(models.float_model, data, known_baseline, here)
            ):
                introduce(
                    f"warning: changed since the run was begun, {change}: its last bits may differ"
                )
            baseline = known_baseline or _measure_baseline(
                models.float_model, data, recipe, here, listener
            )
            introduce(f"float {data.judged_by.name}: {data.judged_by.text(baseline.accuracy, ' ')}")
            inputs_warning = _input_warning(models, data, baseline.accuracy, recipe)
            if inputs_warning:
                introduce(f"warning: {inputs_warning}")
            _apply_augmentation(data, baseline.augmentation, introduce)
            _check_distillation(models, data, recipe, introduce)
            refuse_written_weights(models.quantized, models.float_model, data)
            trainer = build_trainer(
                models.quantized,
                models.float_model,
                data,
                models.budget,
                recipe,
                identity.steps,
                saved,
                listener.progress,
                models.teacher.model,
            )
        if saved:
            listener.note(f"resumed {run.path} at step {trainer.step} of {trainer.steps}")
            run.truncate_metrics(trainer.step)
        with explain_user_errors("Training failed", DDQError, recipe):
            train(trainer, run, identity, baseline, listener)
            accuracy, others = start_accuracy(trainer), []
            if accuracy is None or data.others:
                with trainer.quantized.folded():
                    accuracy, *others = evaluate_all(
                        trainer.model, data, on_progress=listener.progress
                    )
            trainer.gates.check_kept()
        run_course = course(trainer, baseline, accuracy)
        warnings = find_warnings(trainer, run.metrics(), run_course)
        for warning in warnings:
            listener.note(f"warning: {warning}")
        if inputs_warning:
            warnings.insert(0, inputs_warning)
        accuracies = baseline.accuracy, accuracy
        measured = _measured(data, baseline.others, others)
        report = _write_results(
            run, trainer, models.source, accuracies, measured, run_course, warnings
        )
    return FinetuneResult(run.path, report, time.monotonic() - began)


def plan(checkpoint_path: Path, recipe: Recipe) -> Report:
    """Return the report of the first bits, before any training and without data.

    Raises DDQError and its children, such as BudgetError for a budget that cannot be met.
    """
    recipe = recipe.with_checkpoint(checkpoint_path)
    models = _load_and_convert(checkpoint_path, recipe, None, SilentListener().note)
    return _first_report(models, recipe)


# ---- load and convert


@dataclass(frozen=True)
class _Teacher:
    """The network to distill from, in eval mode and without gradients."""

    model: nn.Module
    name: str
    sha256: str | None  # of its checkpoint; None if it is the float model


@dataclass(frozen=True)
class _Models:
    """The float model, its teacher, its quantized copy, and the budget of that copy."""

    float_model: nn.Module  # the checkpoint's network in eval mode, without gradients
    teacher: _Teacher
    quantized: QuantizedModel
    budget: ResolvedBudget
    device: torch.device
    source: Source


def _load_and_convert(
    checkpoint_path: Path, recipe: Recipe, start: Run | None, introduce: _Note
) -> _Models:
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
    return _Models(model, teacher, quantized, budget, device, source)


def _without_seven_bits(recipe: Recipe) -> Recipe:
    """Offer no 7 bits for an ONNX file, which stores them as 8."""
    if recipe.budget.target_format != "onnx" or recipe.rule == "paper":
        return recipe
    offered = [bits for bits in recipe.weights.bits_offered if bits != 7]
    weights = recipe.weights.model_copy(update={"bits_offered": offered})
    return recipe.model_copy(update={"weights": weights})


def _load_teacher(
    float_model: nn.Module, recipe: Recipe, device: torch.device, introduce: _Note
) -> _Teacher:
    """Return the recipe's teacher, by default the float model.

    Raises UsageError for a teacher that the recipe does not use.
    """
    section = recipe.train.teacher
    if section.checkpoint is None:
        return _Teacher(float_model, "the float model", None)
    if recipe.train.distill.weight == 0:
        raise UsageError(
            "train.teacher is given, and train.distill.weight=0 trains without it; give one."
        )
    checkpoint = load_checkpoint(Path(section.checkpoint), pickle=recipe.model.pickle)
    built = build_model(checkpoint, section.arch, section.kwargs)
    introduce(f"teacher: {built.note}; {checkpoint.note}")
    model = place_model(built.model, device).eval().requires_grad_(False)
    return _Teacher(model, section.checkpoint, checkpoint.sha256)


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
    final = run.load(FINAL)
    trained = final["weights"] | final["floats"]  # shared tensors under one of their names
    trained |= final.get("unfolded", {})
    for name, value in model.state_dict().items():
        # A buffer that a forward pass resizes may differ in shape.
        if name in trained and trained[name].shape == value.shape:
            value.copy_(trained[name])


def _first_report(models: _Models, recipe: Recipe, warnings: Sequence[str] = ()) -> Report:
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


# ---- data and the float model's baseline


def _load_data(recipe: Recipe, models: _Models, introduce: _Note) -> Data:
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


def _for_format(models: _Models, recipe: Recipe, data: Data, introduce: _Note) -> _Models:
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


def _try_data(models: _Models, recipe: Recipe, introduce: _Note) -> tuple[_Models, list[str]]:
    """Raise what a run would raise at its first batches.

    Returns the models with their budget, and a warning of the inputs, if any.
    """
    data = _load_data(recipe, models, introduce)
    models = _for_format(models, recipe, data, introduce)
    with explain_user_errors(_CANNOT_RUN, UsageError, recipe):
        accuracy = try_data(models.float_model, data, recipe.train.distill)
        value = data.judged_by.text(accuracy, " ")
        introduce(f"float {data.judged_by.name} on one batch: {value}")
        warning = _input_warning(models, data, math.nan, recipe)  # a batch may be of one class
        _check_distillation(models, data, recipe, introduce)
        refuse_written_weights(models.quantized, models.float_model, data)
    return models, [warning] if warning else []


def _saved_baseline(start: Run | None, identity: RunIdentity) -> FloatBaseline | None:
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


def _measure_baseline(
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


def _input_warning(models: _Models, data: Data, accuracy: float, recipe: Recipe) -> str | None:
    """Return a warning if the data do not fit the float model; None on ranks other than 0."""
    if not distributed.is_main():
        return None
    section = recipe.data
    normalization = f"data.mean {section.mean}, data.std {section.std}"
    if data.augment is None:
        normalization = "your factory's"
    return input_warning(models.float_model, data, accuracy, normalization)


def _apply_augmentation(data: Data, detected: DetectedAugmentation, introduce: _Note) -> None:
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


def _check_distillation(models: _Models, data: Data, recipe: Recipe, introduce: _Note) -> None:
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


# ---- results


def _measured(data: Data, before: Sequence[float], after: Sequence[float]) -> tuple[Measured, ...]:
    """Return the metrics that decide nothing, of the float and of the delivered model."""
    values = zip(data.others, before, after, strict=True)
    return tuple(
        Measured(metric=metric, accuracy=Accuracy.of(b, a, metric)) for (_, metric), b, a in values
    )


def _write_results(
    run: Run,
    trainer: Trainer,
    source: Source,
    accuracy: tuple[float, float],
    others: Sequence[Measured],
    run_course: Course,
    warnings: list[str],
) -> Report:
    """Write final.pt and report.json; return the report.

    `accuracy` is the metric of the float and of the delivered model, `others` are further ones.
    """
    quantized = trainer.quantized
    report = build_report(
        quantized,
        trainer.gates.budget,
        metric=trainer.data.judged_by,
        accuracy=accuracy,
        other_metrics=others,
        course=run_course,
        source=source,
        run=RunFacts(
            steps=trainer.steps, seed=trainer.recipe.train.seed, method=trainer.recipe.method
        ),
        warnings=warnings,
    )
    frozen = freeze(quantized)
    report = with_file_size(report, FrozenModel.from_state(frozen), run.recipe())
    with quantized.folded():
        probed = probe(quantized.model, trainer.data)
    run.save(FINAL, frozen | {"probe": probed})
    run.write_report(report)
    return report
