"""Algorithm 1 of the DDQ paper: quantize, forward, loss, backward, update.

Training cannot harm: about eight times in a run the trainer looks at held-out training samples, and
at the end it delivers the best state it has seen.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.batches import Batch
from ddqcli.data.load import Data
from ddqcli.data.trees import Tree, as_float32
from ddqcli.errors import DataError, DDQError, Interrupted
from ddqcli.qat.budget import average_bits
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.base import Rule
from ddqcli.recipe.schema import Recipe
from ddqcli.training import distributed
from ddqcli.training.batch_norm import batch_norms, reestimate_batch_norm
from ddqcli.training.best_state import BestState
from ddqcli.training.bins import regularize_bins
from ddqcli.training.divergence import Diverged, explain_loss, require_finite
from ddqcli.training.forward import ForwardPass
from ddqcli.training.held_out import HeldOut
from ddqcli.training.metrics import REPORT_EVERY, Look, StepMeans, StepMetrics
from ddqcli.training.optimizers import make_optimizers
from ddqcli.training.signals import hold_signals
from ddqcli.training.step_results import StepResult, StepResults

_LOOKS = 8  # in a run, beside the one before the first step
_SETTLED_LEVELS_LR = 0.1  # of train.levels_lr
_UNFIT = ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


class Trainer:
    """Trains a calibrated model to the end of its run, from its first step or a saved state.

    Args:
        quantized: the model to train, with its gates at their first bits.
        teacher: the float model or another network, for distillation.
        data: training batches and loss.
        gates: the rule that decides bit-widths.
        recipe: optimizers, schedules and precision.
        steps: steps of the whole run.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        teacher: nn.Module | None,
        data: Data,
        gates: Rule,
        recipe: Recipe,
        steps: int,
    ) -> None:
        self.quantized, self.data, self.gates, self.recipe = quantized, data, gates, recipe
        self.model, self.steps, self.step = quantized.model, steps, 0
        self.lr_scale = 1.0  # factor on every learning rate
        self.settled = False  # weights are on their levels, which move less: see `_settle`
        self.gave_up = False  # training diverged twice: the best state is delivered
        self.forward = ForwardPass(self.model, teacher, data, recipe)
        self.bin_regularization = recipe.train.bin_regularization or 0.0
        self.held_out = HeldOut(data, teacher, recipe)
        self.best_state = BestState(self.model, gates, self.held_out)
        self.stages: dict[str, float] = {}  # metric on the evaluation data before training
        device = next(self.model.parameters()).device
        self.reads_each_step = device.type == "cpu"  # elsewhere, reading waits for the device
        self.results = StepResults(device, judge_loss=distributed.shard().count == 1)
        self.means = StepMeans()  # since the last report
        self._look_steps = {round(k * steps / _LOOKS) for k in range(1, _LOOKS)} - {0, steps}
        self.model.train()
        held = recipe.train.batch_norm == "held"
        self.uses_batch_statistics = bool(batch_norms(self.model)) and not held
        self.bn_frozen_from = self._bn_freeze_step()
        self._make_optimizers()

    # ---- the loop

    def run(
        self,
        on_step: Callable[[StepMetrics], None],
        on_look: Callable[[Look], None],
        on_save: Callable[[], None],
    ) -> None:
        """Train from `self.step` to the end, and return to the best state seen.

        `on_step` gets metrics every few steps, `on_look` each look at held-out samples. `on_save`
        is called at each checkpoint, when all parameters are finite. SIGINT and SIGTERM take effect
        at the end of a step, after a checkpoint. Raises Interrupted and Diverged.
        """
        began, first_step = time.monotonic(), self.step
        self.results.clear()
        self._set_train_mode()
        with hold_signals() as signals:
            for x, y in self._batches():
                if self.gates.reads_device(self.step):
                    self._read_results()
                self.gates.before_step(self.step)
                self._train_step(x, y)
                self.step += 1
                if self.step % REPORT_EVERY == 0 or self.step == self.steps:
                    self._read_results()
                    step_seconds = (time.monotonic() - began) / (self.step - first_step)
                    on_step(self._metrics(self.means, step_seconds))
                    self.means = StepMeans()
                if self.step in self._look_steps:
                    self._read_results()
                    on_look(self.look())
                stop = distributed.any_rank(bool(signals), sync=self.step % REPORT_EVERY == 0)
                if stop or self._is_checkpoint_step():
                    self._read_results()
                    parameters = dict(self.model.named_parameters())
                    require_finite(parameters, "A parameter", self._at(self.step))
                    on_save()
                if stop:
                    number = signals[0] if signals else signal.SIGTERM
                    signals.clear()
                    raise Interrupted(f"Stopped at step {self.step} of {self.steps}", number)
        self.gates.finish()
        if self.steps == self.bn_frozen_from:
            self._freeze_batch_norm()
        if self.steps:
            on_look(self.look())
        self.restore_best()

    # ---- looks

    def look(self) -> Look:
        """Look at the held-out samples, and keep this state if it is the best so far.

        If AdamW has made the loss larger than the first one, the run settles. Raises Diverged if
        training has ruined the model.
        """
        look, seen = self.held_out.look(self.model, self.step), self.best_state
        self._set_train_mode()
        seen.add(look)
        if self._may_settle() and seen.is_harmed(look):
            self._settle()
            return look
        if self.step and seen.is_ruined(look):
            raise Diverged(
                f"The held-out loss went from {(seen.start or look).held_out_loss:.3g} to "
                f"{look.held_out_loss:.3g} {self._at(self.step)}"
            )
        seen.keep_if_best(look)
        return look

    def _may_settle(self) -> bool:
        """True until small steps have done harm once."""
        if self.settled or self.best_state.best is None or self.recipe.train.optimizer != "adamw":
            return False
        return 0 < self.step < self.steps

    @torch.no_grad()
    def _settle(self) -> None:
        """Continue from the best state, with weights on their levels and levels that move less.

        Most weights of a compensated start lie near the borders of their cells, where the first
        steps change their levels. A run of many steps, or one with much to gain, recovers from it.
        For others, the middle of the cell keeps what compensation gained.
        """
        self.restore_best()
        for tensor in self.quantized.tensors:
            tensor.parameter.copy_(tensor.quantizer(tensor.parameter))
        self.settled = True
        self.model.zero_grad(set_to_none=True)
        self._make_optimizers()
        self._set_train_mode()

    def _make_optimizers(self) -> None:
        train = self.recipe.train
        if self.settled:
            levels_lr = _SETTLED_LEVELS_LR * train.levels_lr
            train = train.model_copy(update={"levels_lr": levels_lr})
        self.weights_optimizer, self.levels_optimizer = make_optimizers(self.quantized, train)

    def restore_best(self) -> bool:
        """Return to the best state. False if no state within the budget was seen."""
        best, looks = self.best_state.best, self.best_state.looks
        if best is None:
            return False
        if best is not looks[-1] or self.step != best.step:
            self._load_best()
        self.model.eval()
        return True

    def _load_best(self) -> None:
        state = self.best_state.model_and_gates()
        self.load_model(state["model"])
        self.gates.load_state(state["gates"])

    def restart_from_best(self, lr_scale: float) -> bool:
        """Continue from the best state with fresh optimizers. False if there is none."""
        best = self.best_state.best
        if not self.restore_best() or best is None:
            return False
        self._load_best()  # even at its step: a forward pass that diverged moved BatchNorm
        self.step, self.lr_scale, self.means = best.step, lr_scale, StepMeans()
        self.best_state.forget_after(self.step)
        self.model.zero_grad(set_to_none=True)
        self._make_optimizers()
        return True

    def _batches(self) -> Iterator[Batch]:
        """Yield one batch per remaining step. Freezes BatchNorm when its step has come."""
        per_epoch = len(self.data.train)
        while self.step < self.steps:
            if self.step == self.bn_frozen_from:
                self._freeze_batch_norm()  # a pass over the data, so not during another one
            epoch, start = divmod(self.step, per_epoch)
            first_step = self.step
            for number, batch in enumerate(self.data.train.epoch(epoch, start), start + 1):
                yield batch
                if self.step in (self.steps, self.bn_frozen_from) or number >= per_epoch:
                    break
            if self.step == first_step:
                raise DataError(
                    f"Epoch {epoch + 1} of the training data ended after {start} batches; its "
                    f"length is {per_epoch}."
                )

    def _is_checkpoint_step(self) -> bool:
        """True every `save_every` steps, at epoch ends and after the last step."""
        intervals = (self.recipe.train.save_every, len(self.data.train), self.steps)
        return any(self.step % interval == 0 for interval in intervals)

    def _metrics(self, means: StepMeans, step_seconds: float) -> StepMetrics:
        return StepMetrics(
            step=self.step,
            steps=self.steps,
            epoch=(self.step - 1) // len(self.data.train) + 1,
            loss=means.loss,
            train_accuracy=self.data.judged_by.scale * means.score,
            lr=self.weights_optimizer.param_groups[0]["lr"],
            average_bits=average_bits(self.quantized),
            seconds=step_seconds * self.step,
            bits={
                t.name: sum(t.quantizer.bits) / len(t.quantizer.bits)
                for t in self.quantized.tensors
            },
            probabilities={
                name: round(share, 4) for name, share in self.gates.probabilities().items()
            },
            batch_norm_step=self.bn_frozen_from if self.uses_batch_statistics else None,
        )

    def _at(self, step: int) -> str:
        return f"at step {step} of {self.steps}"

    # ---- one step: Algorithm 1

    def _train_step(self, x: Tree, y: Tree) -> None:
        """Do one step. Its results are read later (`_read_results`), or here on the CPU."""
        self._set_learning_rates()
        self._seed()
        # Backward too may quantize, under activation checkpointing.
        with nullcontext() if self.forward.reentrant else self.quantized.batched():
            output, target, loss = self.forward(x, y)
            self._backward(loss)
        self.results.add(self.step + 1, loss, self._gradients().values())
        if self.reads_each_step or self.gates.reads_device(self.step):
            self._read_results(x)
        self._update(loss.detach())
        with torch.no_grad():
            scores = self.data.metric(as_float32(output), y if self.data.labelled else target)
        self.results.add_scores(scores)

    def _set_learning_rates(self) -> None:
        """Decay every learning rate to 0 along half a cosine."""
        factor = self.lr_scale * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def _seed(self) -> None:
        """Make dropout and the like a function of the step and the rank alone."""
        rank = distributed.shard().rank
        torch.manual_seed(self.recipe.train.seed * 1_000_003 + self.step + 2**40 * rank)

    def _backward(self, loss: Tensor) -> None:
        """Lines 4 and 5: gradients of weights, levels and gates, with gradient correction (9)."""
        penalty = self.gates.penalty()  # Eqn 7
        torch.autograd.backward(loss * penalty if penalty != 1 else loss)
        if self.bin_regularization and self.step >= self.gates.frozen_from:
            regularize_bins(self.quantized, self.bin_regularization)

    def _gradients(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def _update(self, loss: Tensor) -> None:
        """Line 6: update gates, weights and levels; after a step that failed, only gates."""
        self.gates.after_backward(self.step, distributed.mean_ranks(loss))
        for optimizer in self._optimizers():
            if not self.reads_each_step:
                optimizer.found_inf = self.results.failed  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    # ---- results of steps

    def _read_results(self, x: Tree | None = None) -> None:
        """Read the steps since the last call, for one wait on the device.

        `x` is the input of the last one if its gradients are still there. Raises Diverged if a loss
        or a gradient is not finite, DDQError if the batch is not.
        """
        for result in self.results.read():
            if not self.results.is_finite(result):
                self._explain(result, x)
            self.means.losses.append(result.loss)
        self.means.scores += self.results.read_scores()

    def _explain(self, result: StepResult, x: Tree | None) -> None:
        """Raise the error of a step that is not finite."""
        at = self._at(result.step)
        if x is None:
            self._repeat(result.step)
            raise Diverged(f"The loss became {result.loss}, or a gradient not finite, {at}")
        # With several ranks, the averaged gradients make all of them raise at once.
        if self.results.judge_loss and not math.isfinite(result.loss):
            self._seed()
            raise explain_loss(self.model, x, result.loss, at)
        require_finite(self._gradients(), "The gradient", at)

    def _repeat(self, step: int) -> None:
        """Do a step again that failed, and read it at once. Raises as it should have.

        Its update and those after it were skipped, so the weights are what they were.
        """
        self.step, reads_each_step = step - 1, self.reads_each_step
        self.model.zero_grad(set_to_none=True)
        x, y = next(iter(self.data.train.epoch(*divmod(self.step, len(self.data.train)))))
        try:
            self.reads_each_step = True
            self._train_step(x, y)
        finally:
            self.reads_each_step = reads_each_step

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.weights_optimizer, self.levels_optimizer) if o]

    # ---- BatchNorm

    def _bn_freeze_step(self) -> int:
        """Return the step from which BatchNorm's statistics stay fixed.

        It comes after the gates have frozen, and at the end of an epoch if one is left.
        """
        if not batch_norms(self.model):
            return self.steps
        if self.recipe.train.batch_norm == "held":
            return 0
        per_epoch = len(self.data.train)
        earliest = max(int(self.recipe.train.bn_freeze * self.steps), self.gates.frozen_from + 1)
        epoch_end = math.ceil(earliest / per_epoch) * per_epoch
        return min(self.steps, epoch_end if epoch_end < self.steps else earliest)

    def _freeze_batch_norm(self) -> None:
        """Re-estimate BatchNorm's statistics with the current weights, then keep them fixed."""
        if self.steps and self.recipe.train.batch_norm != "held":
            torch.manual_seed(self.recipe.train.seed)
            batches = self.data.train.epoch(self.recipe.train.epochs)
            reestimate_batch_norm(self.model, islice(batches, self.recipe.train.bn_batches))
            self._set_train_mode()

    def _set_train_mode(self) -> None:
        """Set the model to train mode, but for frozen BatchNorm layers."""
        self.model.train()
        if self.step >= self.bn_frozen_from:
            for norm in batch_norms(self.model):
                norm.training = False

    # ---- saved state

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs.

        Random numbers follow from seed, epoch and step, so no generator states are included.
        """
        return {
            "step": self.step,
            "lr_scale": self.lr_scale,
            "settled": self.settled,
            "gave_up": self.gave_up,
            "model": self.model.state_dict(),
            "weights_optimizer": self.weights_optimizer.state_dict(),
            "levels_optimizer": (
                self.levels_optimizer.state_dict() if self.levels_optimizer else None
            ),
            "gates": self.gates.state(),
            **self.best_state.state(),
            "stages": self.stages,
            "means": asdict(self.means),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Raises DDQError if it does not fit this model."""
        self.model.zero_grad(set_to_none=True)
        try:
            self.step, self.lr_scale = int(state["step"]), float(state["lr_scale"])
            if not 0 <= self.step <= self.steps:
                raise ValueError(self._at(self.step))
            self.settled, self.gave_up = bool(state["settled"]), bool(state["gave_up"])
            self.best_state.load(state)
            if self.best_state.best is not None:
                self._load_best()  # it has to fit now, not when training returns to it
            self.load_model(state["model"])
            self.weights_optimizer.load_state_dict(state["weights_optimizer"])
            if self.levels_optimizer:
                self.levels_optimizer.load_state_dict(state["levels_optimizer"])
            self.gates.load_state(state["gates"])
            self.stages = {str(name): float(value) for name, value in state["stages"].items()}
            if not all(map(math.isfinite, self.stages.values())):
                raise ValueError("a stage's metric is not finite")
            self.means = StepMeans(**state["means"])
        except _UNFIT as error:
            raise DDQError(
                "The saved state does not fit this model: another version of ddq wrote it."
            ) from error

    def load_model(self, state: dict[str, Tensor]) -> None:
        """Load parameters and buffers. Buffers that a forward pass has resized get their shapes."""
        for name, buffer in self.model.named_buffers():
            if name in state and buffer.shape != state[name].shape:
                buffer.data = state[name].to(buffer.device, copy=True)
        self.model.load_state_dict(state)
