"""`ddq finetune`: a trained model and a budget in, a run folder with the quantized model out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.commands.baseline import (
    CANNOT_RUN,
    apply_augmentation,
    check_distillation,
    data_with_targets,
    fit_memory_format,
    measure_baseline,
    saved_baseline,
    try_run,
    warning_of_inputs,
)
from ddqcli.commands.networks import first_report, load_and_convert, with_format_budget
from ddqcli.commands.run_folder import record_code, run_folder
from ddqcli.data.load import Data
from ddqcli.data.source_files import fingerprint_of_files
from ddqcli.errors import DDQError, UsageError
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.encode_run import with_file_size
from ddqcli.runs.evaluation import Accuracy, Course, Measured
from ddqcli.runs.report import Report, RunFacts, Source
from ddqcli.runs.run import FINAL, Run
from ddqcli.runs.trust import code_files
from ddqcli.training import distributed
from ddqcli.training.device import is_contiguous
from ddqcli.training.diagnostics import find_warnings
from ddqcli.training.evaluate import evaluate_all, probe
from ddqcli.training.listener import Listener, SilentListener, main_listener
from ddqcli.training.network_checks import refuse_written_weights
from ddqcli.training.report import build_report
from ddqcli.training.run_kernels import kernels_of, warning_of_kernels, with_kernels
from ddqcli.training.run_state import FloatBaseline, RunIdentity
from ddqcli.training.same_run import changes, check_same_model, surroundings
from ddqcli.training.session import build_trainer, course, start_accuracy, total_steps, train
from ddqcli.training.trainer import Trainer
from ddqcli.training.trial import try_loss
from ddqcli.training.user_errors import explain_user_errors

_CHANGED = "warning: changed since the run was begun, {}: its last bits may differ"


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    A dry run leaves `run_dir` None; its report describes the run that would be trained.
    """

    run_dir: Path | None
    report: Report
    seconds: float  # that the command took; of a resumed run, since it was resumed
    file_format: str = "safetensors"  # of the file that the budget is for

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
    models = load_and_convert(checkpoint_path, recipe, start, introduce)
    if models.budget.limit is None:
        introduce(
            f"no budget is given: weights take up to {recipe.weights.max_bits} bits, their "
            "maximum; give --target-bits 4 or --target-size 150kB"
        )
    if dry_run:
        models, warnings = try_run(models, recipe, introduce)
        report = first_report(models, recipe, warnings)
        return FinetuneResult(None, report, time.monotonic() - began)
    in_folder = run_folder(run, run_dir, recipe, introduce)
    with distributed.process_group(models.device), in_folder as run:
        data = data_with_targets(recipe, models, introduce)
        with explain_user_errors(CANNOT_RUN, UsageError, recipe):
            fit_memory_format(models, data, introduce)
            models = with_format_budget(models, recipe, data, introduce)
        record_code(run, recipe, introduce)
        listener.judged_by(data.judged_by)
        identity = RunIdentity(
            sha256=models.source.sha256,
            teacher=models.teacher.sha256,
            recipe=run.recipe_text(),
            steps=total_steps(recipe, data),
            data=data.fingerprint(),
            files=fingerprint_of_files(recipe.data.source, introduce),
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
        start_baseline = saved_baseline(start, identity)
        saved = distributed.broadcast(
            run.load_resume_state(identity.state()) if distributed.is_main() else None
        )
        known_baseline = FloatBaseline.from_state(saved) if saved else start_baseline
        if known_baseline and len(known_baseline.others) != len(data.others):
            raise DDQError(
                "The data's metrics are not those that the run was begun with; begin a new run."
            )
        with explain_user_errors(CANNOT_RUN, UsageError, recipe):
            if known_baseline and (
                change := check_same_model(models.float_model, data, known_baseline, here)
            ):
                introduce(_CHANGED.format(change))
            baseline = known_baseline or measure_baseline(
                models.float_model, data, recipe, here, listener
            )
            introduce(f"float {data.judged_by.name}: {data.judged_by.text(baseline.accuracy, ' ')}")
            inputs_warning = warning_of_inputs(models, data, baseline.accuracy, recipe)
            if inputs_warning:
                introduce(f"warning: {inputs_warning}")
            apply_augmentation(data, baseline.augmentation, introduce)
            check_distillation(models, data, recipe, introduce)
            refuse_written_weights(models.quantized, models.float_model, data)
            if not saved:
                try_loss(models.float_model, data, recipe.train.distill)
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
        if warning := warning_of_kernels(trainer.quantized):
            introduce(f"warning: {warning}")
        if saved:
            if change := changes(baseline, {"kernels": kernels_of(trainer.quantized)}):
                listener.note(_CHANGED.format(change))
            listener.note(f"resumed {run.path} at step {trainer.step} of {trainer.steps}")
            run.truncate_metrics(trainer.step)
        else:
            baseline = with_kernels(baseline, trainer.quantized)
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
    file_format = recipe.budget.target_format
    return FinetuneResult(run.path, report, time.monotonic() - began, file_format)


def plan(checkpoint_path: Path, recipe: Recipe) -> Report:
    """Return the report of the first bits, before any training and without data.

    Raises DDQError and its children, such as BudgetError for a budget that cannot be met.
    """
    recipe = recipe.with_checkpoint(checkpoint_path)
    models = load_and_convert(checkpoint_path, recipe, None, SilentListener().note)
    return first_report(models, recipe)


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
    contiguous = {"contiguous": True} if is_contiguous(quantized.model) else {}
    run.save(FINAL, frozen | {"probe": probed} | contiguous)
    run.write_report(report)
    return report
