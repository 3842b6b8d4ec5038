"""A training session: calibrate, then train in a run folder with checkpoints and one rollback."""

from __future__ import annotations

from typing import Any

from torch import nn

from ddqcli.data.load import Data
from ddqcli.data.seeding import seeded
from ddqcli.errors import DDQError
from ddqcli.qat.budget import ResolvedBudget
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.registry import make_rule
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.evaluation import Course, Metric
from ddqcli.runs.run import LAST, Run
from ddqcli.training import distributed
from ddqcli.training.balance import balance_channels
from ddqcli.training.calibrate import calibrate
from ddqcli.training.defaults import with_defaults
from ddqcli.training.distillation import distillation_weight
from ddqcli.training.divergence import Diverged
from ddqcli.training.evaluate import OnProgress, evaluate
from ddqcli.training.listener import Listener
from ddqcli.training.memory import keep_freed_memory
from ddqcli.training.metrics import REPORT_EVERY, Look, StepMetrics
from ddqcli.training.network_checks import few_inputs, refuse_batch_of_one
from ddqcli.training.run_state import FloatBaseline, RunIdentity
from ddqcli.training.snapshot import is_snapshot_step, snapshot
from ddqcli.training.start import choose_start
from ddqcli.training.trainer import Trainer

ROLLBACK_LR_SCALE = 0.1
_CALIBRATION_BATCHES = 16
_COMPILE_FROM = 2e8  # values quantized in a run; fewer do not repay the second of compiling


def total_steps(recipe: Recipe, data: Data) -> int:
    """Return the steps of the whole run."""
    steps = recipe.train.epochs * len(data.train)
    return steps if recipe.train.max_steps is None else min(steps, recipe.train.max_steps)


def build_trainer(
    quantized: QuantizedModel,
    float_model: nn.Module | None,
    data: Data,
    budget: ResolvedBudget,
    recipe: Recipe,
    steps: int,
    saved: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    teacher: nn.Module | None = None,
) -> Trainer:
    """Calibrate the model, choose its first bits and its start, and return a trainer.

    It distills from the `teacher`, by default the float model. The trainer stands at its first
    step, or at that of the `saved` state. Raises BudgetError if the first forward pass shows that
    the budget cannot be met.
    """
    batch_size = round(data.train.samples / len(data.train))  # data from a factory have their own
    recipe = with_defaults(recipe, steps, batch_size)
    gates = make_rule(recipe.rule, quantized, recipe, budget, steps, batch_size)
    distilled = recipe.train.distill.layers
    balanced = float_model and balance_channels(quantized, float_model, few_inputs(data), distilled)
    needs_labels = distillation_weight(recipe.train.distill, data) < 1
    labeler = None if needs_labels else float_model
    with seeded("calibrate", recipe.train.seed):  # some networks draw numbers in eval mode, too
        calibrate(quantized, data, _CALIBRATION_BATCHES, gates.watch, labeler, on_progress)
    gates.recount()
    gates.start()
    _compile_if_worthwhile(quantized, steps)
    keep_freed_memory()
    trainer = Trainer(
        quantized, float_model if teacher is None else teacher, data, gates, recipe, steps
    )
    if trainer.uses_batch_statistics and float_model is not None:
        refuse_batch_of_one(float_model, data)
    if saved:
        trainer.load(saved)
        return trainer
    if distributed.shard().count > 1:  # each rank has calibrated on its own shard
        trainer.load(distributed.broadcast(trainer.state()))

    def metric() -> float:
        with quantized.folded():
            return evaluate(trainer.model, data, on_progress=on_progress)

    with seeded("start", recipe.train.seed):
        choose_start(trainer, balanced, metric, on_progress)
    return trainer


def _compile_if_worthwhile(quantized: QuantizedModel, steps: int) -> None:
    """Let a C compiler make the quantizers' kernels for a long run on a CPU."""
    values = sum(activation.values for activation in quantized.activations.values())
    values += sum(tensor.parameter.numel() for tensor in quantized.tensors)
    use_compiled = steps * values >= _COMPILE_FROM
    for tensor in quantized.tensors:
        tensor.quantizer.use_compiled = use_compiled
    for activation in quantized.activations.values():
        activation.use_compiled = use_compiled


def train(
    trainer: Trainer,
    run: Run,
    identity: RunIdentity,
    baseline: FloatBaseline,
    listener: Listener,
) -> None:
    """Train to the end, with metrics, snapshots and checkpoints in the run folder.

    The best state seen is delivered. If training diverges, it returns to that state and continues
    at a tenth of the learning rate; if it diverges again, it ends there.
    """

    def report(metrics: StepMetrics) -> None:
        run.append_metrics(metrics)
        if (
            is_snapshot_step(metrics.step, metrics.steps, REPORT_EVERY)
            and metrics.step < metrics.steps
        ):
            run.append_metrics(snapshot(trainer.quantized, metrics.step))
        listener.step(metrics)

    def report_look(look: Look) -> None:
        # A run that was killed after its last checkpoint may have reported its last look.
        if not any(entry["step"] == look.step for entry in run.looks()):
            run.append_metrics(look)
        listener.look(look)

    def save() -> None:
        distributed.check_identical(trainer.model.parameters(), "The weights, levels and gates")
        run.save(LAST, {**trainer.state(), **identity.state(), **baseline.state()})

    if trainer.step == 0:
        save()
        _add_snapshot_once(trainer, run)
        report_look(trainer.looks[0])
        if trainer.steps:
            listener.note(_start_note(trainer.looks[0], trainer.data.judged_by))
    while not trainer.gave_up:
        try:
            trainer.run(report, report_look, save)
            break
        except Diverged as error:
            step = trainer.step
            _roll_back(trainer, run)
            save()
            run.truncate_metrics(trainer.step)
            if trainer.gave_up:
                listener.note(
                    f"warning: {error}, also at a tenth of the learning rate; training ends, and "
                    f"the best state, of step {trainer.step}, is delivered"
                )
            else:
                lr = ROLLBACK_LR_SCALE * (trainer.recipe.train.lr or 0)
                listener.note(
                    f"warning: {error}; back from step {step} to the best state, of step "
                    f"{trainer.step}, continuing with train.lr {lr:g}"
                )
    _add_snapshot_once(trainer, run)


def _start_note(look: Look, metric: Metric) -> str:
    """Return the figures before the first step, which those of training are held against."""
    value = metric.text(look.held_out_accuracy, " ")
    return f"start: held-out loss {look.held_out_loss:.3f}, held-out {metric.name} {value}"


def _roll_back(trainer: Trainer, run: Run) -> None:
    """Return to the best state at a lower learning rate; the second time, to stay there.

    Before any state has met the budget, the last checkpoint stands in for the best state. Raises
    DDQError if training diverges again without one.
    """
    distributed.barrier()
    again = trainer.lr_scale != 1
    if not trainer.restart_from_best(ROLLBACK_LR_SCALE):
        trainer.load(run.load(LAST))
        if again:
            raise DDQError(
                "Training diverged, also at a tenth of the learning rate. The state at step "
                f"{trainer.step} is kept in {run.path}; begin a new run with a smaller "
                f"--set train.lr (now {trainer.recipe.train.lr:g})."
            )
        trainer.lr_scale = ROLLBACK_LR_SCALE
    trainer.gave_up = again


def start_accuracy(trainer: Trainer) -> float | None:
    """Return the accuracy measured before training, if that is the state which is delivered."""
    if trainer.best is None or trainer.best.step:
        return None
    return list(trainer.stages.values())[-1]


def course(trainer: Trainer, baseline: FloatBaseline, accuracy: float) -> Course:
    """Return the stages of a finished run; `accuracy` is the delivered state's metric."""
    before = {"float": baseline.accuracy, **trainer.stages}
    best_step = trainer.steps if trainer.best is None else trainer.best.step
    delivered = "trained" if best_step else list(trainer.stages)[-1]
    stages = before | {delivered: accuracy}
    return Course.model_validate(
        {
            "stages": [
                {"name": name, "accuracy": trainer.data.judged_by.rounded(value)}
                for name, value in stages.items()
            ],
            "delivered": delivered,
            "looks": len(trainer.looks),
            "best_step": best_step,
        }
    )


def _add_snapshot_once(trainer: Trainer, run: Run) -> None:
    """Add a snapshot of this step, unless the run was killed after it had been added."""
    if not any(entry["step"] == trainer.step for entry in run.snapshots()):
        run.append_metrics(snapshot(trainer.quantized, trainer.step))
