"""`ddq finetune`: a trained model and a budget in, a run folder with the quantized model out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ddqcli import __version__
from ddqcli.engine.checkpoint import load_checkpoint
from ddqcli.engine.convert import Converted, convert
from ddqcli.engine.data import Data, load_data
from ddqcli.engine.evaluate import calibrate, evaluate, reestimate_batch_norm
from ddqcli.engine.gates import Budget, Gates, make_budget
from ddqcli.engine.models import build_model
from ddqcli.engine.results import freeze, make_report
from ddqcli.engine.runs import LAST, Run
from ddqcli.engine.train import StepMetrics, Trainer
from ddqcli.errors import UsageError
from ddqcli.quant.activation import can_fuse
from ddqcli.recipe import Recipe

_CALIBRATION_BATCHES = 16
_FUSE_FROM_STEPS = 200  # compiling takes some seconds; a shorter run does not win them back


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
    """A finished run; `run_dir` is None after a dry run, and the report then says what would be trained."""

    run_dir: Path | None
    report: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return {"run_dir": None if self.run_dir is None else str(self.run_dir), **self.report}


def finetune(
    checkpoint_path: Path,
    recipe: Recipe,
    *,
    run: Run | None = None,
    run_dir: Path | None = None,
    dry_run: bool = False,
    listener: Listener | None = None,
) -> FinetuneResult:
    """Finetune a checkpoint as the recipe says. Raises DDQError and its children.

    `run` is an unfinished run to go on with; otherwise a new one is made at `run_dir`. With `dry_run`, stop where data
    would be read.
    """
    listener = listener or Listener()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpoint": str(checkpoint_path)})})
    device = _device(recipe.train.device)
    checkpoint = load_checkpoint(checkpoint_path, pickle=recipe.model.pickle)
    built = build_model(checkpoint, recipe.model.arch, recipe.model.kwargs)
    listener.note(f"model: {built.note}; {checkpoint.note}")
    teacher = _on(built.model, device).eval().requires_grad_(False)  # the float model, which stays as it is
    converted = convert(copy.deepcopy(teacher).requires_grad_(True), recipe)
    budget = make_budget(converted, recipe)  # an impossible budget is refused before any data are read
    source = {"path": str(checkpoint_path), "sha256": checkpoint.sha256, "arch": built.arch, "ddq": __version__}
    if dry_run:
        Gates(converted, recipe, budget, 0, recipe.data.batch_size).start()
        report = make_report(
            converted, budget, accuracy=None, source=source, run={"steps": 0, "seed": recipe.train.seed}
        )
        return FinetuneResult(None, report)
    data = load_data(recipe.data, seed=recipe.train.seed, device=device)
    listener.note(f"data: {data.note}")
    steps = _steps(recipe, data)
    saved = run.saved(checkpoint.sha256) if run else None
    if run is None:
        run = Run.create(run_dir, recipe.name or checkpoint_path.stem)
        run.write_recipe(recipe)
    before = saved["float_accuracy"] if saved else evaluate(teacher, data, on_progress=listener.progress)
    listener.note(f"float accuracy: {before:.2f} %")
    trainer = _trainer(converted, teacher, data, budget, recipe, steps, saved)
    if saved:
        listener.note(f"resumed {run.path} at step {trainer.step} of {steps}")
        run.cut_metrics(trainer.step)
    _train(trainer, run, {"float_accuracy": before, "sha256": checkpoint.sha256}, listener)
    if recipe.train.bn_batches and steps:
        torch.manual_seed(recipe.train.seed)
        reestimate_batch_norm(converted.model, islice(data.train.epoch(recipe.train.epochs), recipe.train.bn_batches))
    after = evaluate(converted.model, data, on_progress=listener.progress)
    report = make_report(
        converted, budget, accuracy=(before, after), source=source, run={"steps": steps, "seed": recipe.train.seed}
    )
    run.save("final.pt", freeze(converted))
    run.write_report(report)
    return FinetuneResult(run.path, report)


def _train(trainer: Trainer, run: Run, facts: dict[str, Any], listener: Listener) -> None:
    """The loop, with its metrics and checkpoints in the run folder."""

    def on_step(metrics: StepMetrics) -> None:
        run.add_metrics(metrics)
        listener.step(metrics)

    trainer.run(on_step, lambda: run.save(LAST, {**trainer.state(), **facts}))


def _trainer(
    converted: Converted,
    teacher: torch.nn.Module,
    data: Data,
    budget: Budget,
    recipe: Recipe,
    steps: int,
    saved: dict[str, Any] | None,
) -> Trainer:
    """A trainer at its first step, or where `saved` left off."""
    gates = Gates(converted, recipe, budget, steps, recipe.data.batch_size)
    calibrate(converted, data, _CALIBRATION_BATCHES, gates.watch)
    gates.start()
    fused = bool(converted.activations) and steps >= _FUSE_FROM_STEPS and can_fuse(_device(recipe.train.device))
    for activation in converted.activations.values():
        activation.fused = fused
    trainer = Trainer(converted, teacher if recipe.train.distill.weight else None, data, gates, recipe, steps)
    if saved:
        trainer.load(saved)
    return trainer


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device is cuda, and no CUDA device is available here; use auto or cpu.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _on(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on the device, in the memory format that is faster for images."""
    images = any(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    return model.to(device, memory_format=torch.channels_last) if images else model.to(device)


def _steps(recipe: Recipe, data: Data) -> int:
    steps = recipe.train.epochs * len(data.train)
    return steps if recipe.train.max_steps is None else min(steps, recipe.train.max_steps)
