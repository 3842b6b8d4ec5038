"""Algorithm 1's loop: quantize, forward, backward with gradient correction, update weights, levels and gates."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.load import Data
from ddqcli.errors import DataError, DDQError, Interrupted
from ddqcli.qat.budget import average_bits
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.base import Rule
from ddqcli.recipe.schema import Recipe
from ddqcli.training import distributed
from ddqcli.training.batch_norm import batch_norms, reestimate_batch_norm
from ddqcli.training.distillation import distillation, distillation_weight, flips_at_random
from ddqcli.training.evaluate import output_of
from ddqcli.training.optimizers import make_optimizers
from ddqcli.training.signals import hold_signals

REPORT_EVERY = 10  # steps


@dataclass(frozen=True)
class StepMetrics:
    """What a run says of itself every few steps."""

    step: int  # steps done
    steps: int
    epoch: int
    loss: float  # mean since the last report
    train_accuracy: float  # percent, mean since the last report
    lr: float
    average_bits: float  # stored, a weight: what the report calls so
    seconds: float  # all steps so far, at this process's pace
    bits: dict[str, float]  # by tensor

    @property
    def remaining(self) -> float:
        """Seconds left at the pace so far."""
        return self.seconds / max(1, self.step) * (self.steps - self.step)


class Diverged(DDQError):
    """Training left the finite numbers; the message says at which step and in which layer."""


class Trainer:
    """One finetuning run: all of its state, and the loop."""

    def __init__(
        self,
        converted: QuantizedModel,
        teacher: nn.Module | None,
        data: Data,
        gates: Rule,
        recipe: Recipe,
        steps: int,
    ) -> None:
        self.converted, self.data, self.gates, self.recipe = converted, data, gates, recipe
        self.model, self.steps, self.step = converted.model, steps, 0
        self.lr_scale = 1.0  # of every step size
        self.distilled = distillation_weight(recipe.train.distill, data)  # of the loss
        self.teacher = teacher if self.distilled else None
        self.model.train()
        self.bn_frozen_from = self._bn_frozen_from()
        self.parallel = distributed.data_parallel(self.model)
        self.weights_optimizer, self.levels_optimizer = make_optimizers(converted, recipe.train)

    def run(self, on_step: Callable[[StepMetrics], None], on_save: Callable[[], None]) -> None:
        """Train from `self.step` to the end. `on_save` is called where the state is worth keeping.

        Ctrl-C and SIGTERM wait for the step's end, save, and raise Interrupted. Raises Diverged; what was saved is finite.
        """
        began, first = time.monotonic(), self.step
        loss_sum, hits, count = 0.0, 0.0, 0
        self._train_mode()
        with hold_signals() as caught:
            for x, y in self._batches():
                self.gates.before_step(self.step)
                loss, score = self._train_step(x, y)
                loss_sum, hits, count = loss_sum + loss, hits + score, count + 1
                self.step += 1
                if self.step % REPORT_EVERY == 0 or self.step == self.steps:
                    on_step(
                        self._metrics(
                            loss_sum / count, 100 * hits / count, (time.monotonic() - began), first
                        )
                    )
                    loss_sum, hits, count = 0.0, 0.0, 0
                stopping = distributed.any_rank(bool(caught), self.step % REPORT_EVERY == 0)
                if stopping or self._is_checkpoint_step():
                    self._check(dict(self.model.named_parameters()), "A parameter")
                    on_save()
                if stopping:
                    number = caught[0] if caught else signal.SIGTERM
                    caught.clear()
                    raise Interrupted(f"Stopped at step {self.step} of {self.steps}", number)
        self.gates.finish()
        if self.steps == self.bn_frozen_from:
            self._freeze_batch_norm()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs: random numbers follow from seed, epoch and step, so none are stored."""
        return {
            "step": self.step,
            "lr_scale": self.lr_scale,
            "model": self.model.state_dict(),
            "weights_optimizer": self.weights_optimizer.state_dict(),
            "levels_optimizer": self.levels_optimizer.state_dict()
            if self.levels_optimizer
            else None,
            "gates": self.gates.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state; raises DDQError if it is not one of this model."""
        self.model.zero_grad(set_to_none=True)
        try:
            self.step, self.lr_scale = state["step"], state["lr_scale"]
            self.model.load_state_dict(state["model"])
            self.weights_optimizer.load_state_dict(state["weights_optimizer"])
            if self.levels_optimizer:
                self.levels_optimizer.load_state_dict(state["levels_optimizer"])
            self.gates.load_state(state["gates"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise DDQError(
                "The saved state does not fit this model: another version of ddq wrote it, or a forward pass resizes a buffer."
            ) from error

    def _is_checkpoint_step(self) -> bool:
        """Whether this step is one to save at: every so many, at each epoch's end, and the last."""
        ends = (self.recipe.train.save_every, len(self.data.train), self.steps)
        return any(self.step % end == 0 for end in ends)

    def _bn_frozen_from(self) -> int:
        """The step from which BatchNorm's statistics stay: after the bits have frozen, and between epochs if it can be."""
        if not batch_norms(self.model):
            return self.steps
        per_epoch = len(self.data.train)
        first = max(int(self.recipe.train.bn_freeze * self.steps), self.gates.frozen_from + 1)
        epoch_end = math.ceil(first / per_epoch) * per_epoch
        return min(self.steps, epoch_end if epoch_end < self.steps else first)

    def _train_mode(self) -> None:
        self.model.train()
        if self.step >= self.bn_frozen_from:
            for norm in batch_norms(self.model):
                norm.training = False

    def _freeze_batch_norm(self) -> None:
        """Estimate BatchNorm's statistics anew, with the weights as they now are, and leave them so from here on."""
        if self.steps:
            torch.manual_seed(self.recipe.train.seed)
            batches = self.data.train.epoch(self.recipe.train.epochs)
            reestimate_batch_norm(self.model, islice(batches, self.recipe.train.bn_batches))
            self._train_mode()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        per_epoch = len(self.data.train)
        while self.step < self.steps:
            if (
                self.step == self.bn_frozen_from
            ):  # between two passes over the data, since this is one of its own
                self._freeze_batch_norm()
            epoch, start = divmod(self.step, per_epoch)
            before = self.step
            for number, batch in enumerate(self.data.train.epoch(epoch, start)):
                yield batch
                if (
                    self.step in (self.steps, self.bn_frozen_from)
                    or number + start + 1 >= per_epoch
                ):
                    break
            if self.step == before:
                raise DataError(
                    f"The training data gave {start} batches in epoch {epoch + 1}, where {per_epoch} were counted."
                )

    def _train_step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        train, shard = self.recipe.train, distributed.shard()
        factor = self.lr_scale * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        # Dropout and the like: a function of the step alone.
        torch.manual_seed(train.seed * 1_000_003 + self.step + 2**40 * shard.rank)
        autocast = torch.autocast(
            x.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"
        )
        with (
            self.converted.batched()
        ):  # the backward pass, too, may quantize: whatever is recomputed there
            with (
                autocast,
                parametrize.cached(),
            ):  # a weight that is read more than once is quantized once
                target = self._target(x)
                output = output_of(self.parallel(x))
                loss = self._loss(output, y, target)
            value = float(loss.detach())
            if not math.isfinite(value) and shard.count == 1:
                raise self._divergence(
                    x, value
                )  # with more, the averaged gradients tell all processes at once
            penalty = self.gates.penalty()
            (loss * penalty if penalty != 1 else loss).backward()
        self._check(
            {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None},
            "The gradient",
        )
        self.gates.after_backward(self.step, distributed.mean_ranks(value))
        for optimizer in self._optimizers():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value, float(self.data.metric(output.detach().float(), y).float().mean())

    @torch.no_grad()
    def _check(self, tensors: dict[str, Tensor], what: str) -> None:
        """Raise Diverged if one of the tensors is not finite, naming the last: gradients go wrong from the end on."""
        norms = torch._foreach_norm(list(tensors.values()))
        if math.isfinite(float(torch.stack(norms).sum())):
            return
        name = next(
            (n for n, tensor in reversed(tensors.items()) if not tensor.isfinite().all()), None
        )
        if name is not None:
            raise Diverged(
                f"{what} of {_plain(name)} became NaN or infinite at step {self.step + 1} of {self.steps}"
            )

    @torch.no_grad()
    def _divergence(self, x: Tensor, loss: float) -> DDQError:
        """What a loss that is not finite came from: the first layer in whose output something is not."""
        at = f"at step {self.step + 1} of {self.steps}"
        if not x.isfinite().all():
            return DDQError(
                f"The batch {at} holds NaN or infinite values; repair the data and resume."
            )
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(_plain(name))

            return hook

        hooks = [
            module.register_forward_hook(look(name))
            for name, module in self.model.named_modules()
            if name
        ]
        self.model(x)
        for handle in hooks:
            handle.remove()
        return Diverged(
            f"The loss became {loss} {at}, {f'first in {found[0]}' if found else 'though not the output'}"
        )

    @torch.no_grad()
    def _target(self, x: Tensor) -> Tensor | None:
        """The float model's output for x; where training mirrors images at random, its mean with that for the mirrored ones.

        Of copies of x, since a network may change its input in place.
        """
        if self.teacher is None:
            return None
        views = [x.clone(), x.flip(-1)] if flips_at_random(self.data) else [x.clone()]
        return torch.stack([output_of(self.teacher(view)).float() for view in views]).mean(0)

    def _loss(self, output: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return self.data.loss(output, y)
        divergence = distillation(output, target, self.recipe.train.distill.temperature)
        if self.distilled == 1:
            return divergence
        return self.distilled * divergence + (1 - self.distilled) * self.data.loss(output, y)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.weights_optimizer, self.levels_optimizer) if o]

    def _metrics(self, loss: float, accuracy: float, seconds: float, first: int) -> StepMetrics:
        bits = {
            t.name: sum(t.quantizer.bits) / len(t.quantizer.bits) for t in self.converted.tensors
        }
        pace = seconds / max(1, self.step - first)
        return StepMetrics(
            self.step, self.steps, (self.step - 1) // len(self.data.train) + 1, loss, accuracy,
            self.weights_optimizer.param_groups[0]["lr"], average_bits(self.converted), pace * self.step, bits,
        )  # fmt: skip


def _plain(name: str) -> str:
    """conv1.parametrizations.weight.original as conv1.weight."""
    layer, inside, rest = name.partition("parametrizations.")
    return layer + rest.partition(".")[0] if inside else name
