"""Results of training steps, which stay on the device until they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """One step: its number from 1, its loss, and the largest absolute value of its gradients."""

    step: int
    loss: float
    largest_gradient: float


class StepResults:
    """Losses, largest gradients and scores of the steps since they were last read.

    Reading waits for the device, once for all of them.

    Args:
        device: of the model.
        judge_loss: a loss that is not finite fails a step. The gradient always does.

    Attributes:
        failed: float32 scalar on the device; 1 from the first step on that failed, else 0. As an
            optimizer's `found_inf` it skips updates, so the weights stay as they were before it.
    """

    def __init__(self, device: torch.device, *, judge_loss: bool) -> None:
        self.judge_loss = judge_loss
        self.failed = torch.zeros((), device=device)
        self._steps: list[int] = []
        self._losses_and_gradients: list[Tensor] = []  # two for each step
        self._scores: list[Tensor] = []

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, gradients: Iterable[Tensor]) -> None:
        """Add a step: its loss (a scalar) and all gradients."""
        # Unlike a sum of squares, the largest of finite values is finite; it is NaN if one is.
        largest = torch.stack(list(torch._foreach_norm(list(gradients), math.inf))).amax()
        finite = largest.isfinite()
        if self.judge_loss:
            finite &= loss.isfinite()
        self.failed.clamp_(min=(~finite).float())
        self._steps.append(step)
        self._losses_and_gradients += [loss.detach(), largest]

    @torch.no_grad()
    def add_scores(self, scores: Tensor) -> None:
        """Add the scores of a step's samples."""
        self._scores.append(scores.float().mean())

    def read(self) -> list[StepResult]:
        """Return the steps that were added since the last call."""
        values, steps = _read(self._losses_and_gradients), self._steps
        self._losses_and_gradients, self._steps = [], []
        return list(map(StepResult, steps, values[::2], values[1::2]))

    def read_scores(self) -> list[float]:
        """Return the mean scores that were added since the last call."""
        values, self._scores = _read(self._scores), []
        return values

    def clear(self) -> None:
        """Forget what was not read, and any failure."""
        self._steps, self._losses_and_gradients, self._scores = [], [], []
        self.failed.zero_()

    def is_finite(self, result: StepResult) -> bool:
        """True if the step did not fail."""
        judged = [result.largest_gradient, *([result.loss] if self.judge_loss else [])]
        return all(map(math.isfinite, judged))


def _read(scalars: list[Tensor]) -> list[float]:
    values: list[float] = torch.stack([x.double() for x in scalars]).tolist() if scalars else []
    return values
