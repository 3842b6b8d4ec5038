"""`ddq finetune`: a trained model and a budget in, a run folder with the quantized model out."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddqcli import __version__
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.data.load import Data, load_data
from ddqcli.errors import DDQError, Interrupted, UsageError
from ddqcli.qat.budget import Budget, make_budget
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import freeze
from ddqcli.qat.model import QuantizedModel, quantizers
from ddqcli.qat.rules.base import Gates
from ddqcli.quant.compiled import can_compile
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.report import Report
from ddqcli.runs.run import FINAL, LAST, ReadOnlyRun, Run
from ddqcli.training import distributed
from ddqcli.training.calibrate import calibrate
from ddqcli.training.detect_augmentation import detect_augmentation
from ddqcli.training.device import place_model, resolve_device
from ddqcli.training.diagnostics import ROLLED_BACK, find_warnings
from ddqcli.training.distillation import check_distillable, distillation_weight, flips_at_random
from ddqcli.training.evaluate import evaluate, probe
from ddqcli.training.report import build_report
from ddqcli.training.snapshot import is_snapshot_step, snapshot
from ddqcli.training.trainer import REPORT_EVERY, Diverged, StepMetrics, Trainer

_STATE_FORMAT = 1  # of what a training state holds; one of another format cannot be gone on with
_CALIBRATION_BATCHES = 16
_FUSE_FROM = 2e9  # values in all; compiling takes some seconds, which fewer of them do not win back


class Listener:
    """What a caller may want to hear while a run goes on; does nothing by itself."""

    def note(self, text: str) -> None:
        """A decision the user should know of."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A pass over data goes on."""

    def step(self, metrics: StepMetrics) -> None:
        """Training goes on."""


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run. After a dry run `run_dir` is None, and the report is of what would be trained."""

    run_dir: Path | None
    report: Report

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        run_dir = None if self.run_dir is None else str(self.run_dir)
        return {"run_dir": run_dir, **self.report.data()}


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

    `run` is an unfinished run to go on with; otherwise a new one is made at `run_dir`. `start` is a finished run of the same
    checkpoint and data whose float weights training starts from; accuracy is still held against the checkpoint's, and
    distillation's teacher is the checkpoint. `introduced`: the listener knows of model and data. With `dry_run`, stop where
    data would be read.
    """
    listener = listener if listener and distributed.is_main() else Listener()
    introduce = (Listener() if introduced else listener).note
    recipe = recipe.of(checkpoint_path)
    device = distributed.local_device(resolve_device(recipe.train.device))
    checkpoint = load_checkpoint(checkpoint_path, pickle=recipe.model.pickle)
    built = build_model(checkpoint, recipe.model.arch, recipe.model.kwargs)
    introduce(f"model: {built.note}; {checkpoint.note}")
    model = place_model(built.model, device).eval()
    converted = convert(_started(copy.deepcopy(model), start), recipe)
    teacher = model.requires_grad_(False)  # the float model, which stays as it is
    budget = make_budget(
        converted, recipe
    )  # an impossible budget is refused before any data are read
    source = {
        "path": str(checkpoint_path),
        "sha256": checkpoint.sha256,
        "arch": built.arch,
        "ddq": __version__,
    }
    if dry_run:
        gates = Gates(converted, recipe, budget, 0, recipe.data.batch_size)
        gates.start()
        over = budget.limit is not None and gates.cost() > budget.limit
        why = (
            "these are the first bits; gates.rule=paper comes down to the budget while training"
            if recipe.gates.rule == "paper"
            else "the budget can be met only if some layers are never called, whose inputs then cost nothing"
        )
        run_of_none = {"steps": 0, "seed": recipe.train.seed}
        report = build_report(
            converted,
            budget,
            accuracy=None,
            source=source,
            run=run_of_none,
            warnings=[why] if over else (),
        )
        return FinetuneResult(None, report)
    with distributed.process_group(device), _in_folder(run, run_dir, recipe) as run:
        data = load_data(
            recipe.data, seed=recipe.train.seed, device=device, shard=distributed.shard()
        )
        introduce(f"data: {data.note}")
        steps = _steps(recipe, data)
        facts = {
            "format": _STATE_FORMAT,
            "sha256": checkpoint.sha256,
            "recipe": run.recipe_text(),
            "steps": steps,
            "data": data.fingerprint(),
        }
        shared = {fact: value for fact, value in facts.items() if fact != "recipe"}
        looked = _looked(start, shared) if start and distributed.is_main() else None
        saved = distributed.broadcast(run.saved(facts) if distributed.is_main() else None)
        distilled = distillation_weight(recipe.train.distill, data)
        with _explained("The model cannot run on these data", UsageError, recipe):
            if known := saved or distributed.broadcast(looked):
                before, augmentation = known["float_accuracy"], known["augmentation"]
            else:
                before = evaluate(teacher, data, on_progress=listener.progress)
                labels = distilled < 1
                augmentation = distributed.broadcast(
                    detect_augmentation(teacher, data, recipe.data, labels=labels)
                )
            introduce(f"float accuracy: {before:.2f} %")
            for decision in _augment_as_trained(data, augmentation):
                introduce(decision)
            if distilled:
                check_distillable(probe(teacher, data))
                views = ", mean of each image and its mirror image" if flips_at_random(data) else ""
                temperature = recipe.train.distill.temperature
                introduce(
                    f"loss: {100 * distilled:g} % distillation from the float model{views}, temperature {temperature:g}"
                )
            trainer = _trainer(converted, teacher, data, budget, recipe, steps, saved)
        if saved:
            listener.note(f"resumed {run.path} at step {trainer.step} of {steps}")
            run.cut_metrics(trainer.step)
        with _explained("Training failed", DDQError, recipe):
            _train(
                trainer,
                run,
                {**facts, "float_accuracy": before, "augmentation": augmentation},
                listener,
            )
            _keep_snapshot(run, converted, steps)
            after = evaluate(converted.model, data, on_progress=listener.progress)
            trainer.gates.check_kept()
        found = find_warnings(trainer, run.metrics())
        for warning in found:
            listener.note(f"warning: {warning}")
        facts_of_run = {"steps": steps, "seed": recipe.train.seed}
        report = build_report(
            converted,
            trainer.gates.budget,
            accuracy=(before, after),
            source=source,
            run=facts_of_run,
            warnings=found,
        )
        run.save(FINAL, freeze(converted) | {"probe": probe(converted.model, data)})
        run.write_report(report)
    return FinetuneResult(run.path, report)


def _looked(start: Run, shared: dict[str, Any]) -> dict[str, Any] | None:
    """What a run of the same checkpoint and data has found out about the float model; the rest of its state is let go."""
    state = start.saved(shared)
    return state and {fact: state[fact] for fact in ("float_accuracy", "augmentation")}


def _augment_as_trained(data: Data, found: dict[str, Any]) -> list[str]:
    """Augment the training images as the float model's were; says so."""
    said = []
    if data.augment and "fill" in found:
        data.augment.fill = found["fill"]
        said.append(
            f"crops are padded with {found['fill']}: nearest to what the model's BatchNorm has seen"
        )
    if data.augment and "flip" in found:
        data.augment.flip = found["flip"]
        mirrored, reads = (
            ("mirrored at random", "as well") if found["flip"] else ("not mirrored", "less well")
        )
        said.append(f"images are {mirrored}: the model reads mirrored ones {reads}")
    return said


def _started(model: torch.nn.Module, start: Run | None) -> torch.nn.Module:
    """The float model with what another run trained: the weights behind its quantizers, and all else that stays float."""
    if start:
        final = start.load(FINAL)
        trained = final["weights"] | final["floats"]  # shared tensors under one of their names
        for name, value in model.state_dict().items():
            if (
                name in trained and trained[name].shape == value.shape
            ):  # not what a forward pass resizes
                value.copy_(trained[name])
    return model


def opened(run: Run | None, run_dir: Path | None, recipe: Recipe) -> Run:
    """The run to go on with, or a new one; in all processes but the first, only to be read."""
    if distributed.is_main():
        run = run or Run.create(
            run_dir, recipe.name or Path(recipe.model.checkpoint or "model").stem
        )
    path = distributed.broadcast(run and run.path)
    return run if run and distributed.is_main() else ReadOnlyRun(path)


@contextmanager
def _in_folder(run: Run | None, run_dir: Path | None, recipe: Recipe) -> Iterator[Run]:
    """The run to go on with, or a new one, whose folder goes again if an error leaves nothing in it."""
    new, run = run is None, opened(run, run_dir, recipe)
    resume = f"`ddq finetune --resume --run-dir {run.path}` goes on with it."
    with run.locked():
        try:
            if new:
                run.write_recipe(recipe)
            distributed.barrier()
            yield run
        except (KeyboardInterrupt, Interrupted) as stop:
            number = stop.exit_code - 128 if isinstance(stop, Interrupted) else signal.SIGINT
            raise Interrupted(f"{str(stop) or 'Interrupted'}; {resume}", number) from stop
        except Exception as error:
            if distributed.is_lost_peer(error):
                raise DDQError(
                    f"Another process of this run ended, and none can go on alone; {resume}"
                ) from error
            if new:
                run.discard_if_empty()
            raise


@contextmanager
def _explained(what: str, kind: type[DDQError], recipe: Recipe) -> Iterator[None]:
    """Turn what the user's network, or the memory, raises into one sentence."""
    try:
        yield
    except DDQError:
        raise
    except (Exception, SystemExit) as error:
        if distributed.is_lost_peer(error):
            raise
        said = " ".join(str(error).split())[:300]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in said:
            batch = f"try a smaller --set data.batch_size (now {recipe.data.batch_size})"
            raise DDQError(f"{what}: the memory is full; {batch}.") from error
        raise kind(
            f"{what}: {type(error).__name__}: {said}; `ddq --debug ...` shows where."
        ) from error


def _train(trainer: Trainer, run: Run, facts: dict[str, Any], listener: Listener) -> None:
    """The loop, with its metrics and checkpoints in the run folder; one roll-back if it diverges."""

    def on_step(metrics: StepMetrics) -> None:
        run.add_metrics(metrics)
        if (
            is_snapshot_step(metrics.step, metrics.steps, REPORT_EVERY)
            and metrics.step < metrics.steps
        ):
            run.add_metrics(snapshot(trainer.converted, metrics.step))
        listener.step(metrics)

    def keep() -> None:
        distributed.check_identical(trainer.model.parameters(), "The weights, levels and gates")
        run.save(LAST, {**trainer.state(), **facts})

    if trainer.step == 0:
        keep()
        _keep_snapshot(run, trainer.converted, 0)
    try:
        trainer.run(on_step, keep)
    except Diverged as error:
        lr, first = trainer.recipe.train.lr, trainer.lr_scale == 1
        distributed.barrier()
        trainer.load(run.load(LAST))
        if not first:
            raise DDQError(
                f"{error}, also with a tenth of the step size. The state at step {trainer.step} is kept in {run.path}; "
                f"begin a new run with a smaller --set train.lr (now {lr:g})."
            ) from error
        trainer.lr_scale = ROLLED_BACK
        keep()
        run.cut_metrics(trainer.step)
        listener.note(
            f"warning: {error}; went back to step {trainer.step}, on with train.lr {ROLLED_BACK * lr:g}"
        )
        _train(trainer, run, facts, listener)


def _keep_snapshot(run: Run, converted: QuantizedModel, step: int) -> None:
    """Add how the tensors stand to the metrics, unless a process that was killed thereafter has done so."""
    if not any(entry["step"] == step for entry in run.snapshots()):
        run.add_metrics(snapshot(converted, step))


def _trainer(
    converted: QuantizedModel,
    teacher: torch.nn.Module,
    data: Data,
    budget: Budget,
    recipe: Recipe,
    steps: int,
    saved: dict[str, Any] | None,
) -> Trainer:
    """A trainer at its first step, or where `saved` left off."""
    batch_size = round(data.train.samples / len(data.train))  # a user's own batches have their own
    gates = Gates(converted, recipe, budget, steps, batch_size)
    unlabelled = distillation_weight(recipe.train.distill, data) == 1
    calibrate(converted, data, _CALIBRATION_BATCHES, gates.watch, teacher if unlabelled else None)
    gates.recount()  # still before the first step
    gates.start()
    values = sum(a.values for a in converted.activations.values()) + sum(
        t.parameter.numel() for t in converted.tensors
    )
    use_compiled = steps * values >= _FUSE_FROM and can_compile(resolve_device(recipe.train.device))
    for quantizer in quantizers(converted):
        quantizer.use_compiled = use_compiled
    trainer = Trainer(converted, teacher, data, gates, recipe, steps)
    if saved:
        trainer.load(saved)
    elif distributed.shard().count > 1:
        trainer.load(
            distributed.broadcast(trainer.state())
        )  # each process calibrated on its own shard
    return trainer


def _steps(recipe: Recipe, data: Data) -> int:
    steps = recipe.train.epochs * len(data.train)
    return steps if recipe.train.max_steps is None else min(steps, recipe.train.max_steps)
