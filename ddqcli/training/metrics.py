"""Metrics that a run reports every few training steps."""

from __future__ import annotations

from dataclasses import dataclass, field

REPORT_EVERY = 10  # steps


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl: a run's state after a step.

    Attributes:
        step: steps done.
        steps: steps of the whole run.
        epoch: epoch of the step, from 1.
        loss: mean since the last report.
        train_accuracy: value of the metric in its unit, mean since the last report.
        lr: learning rate of the weights.
        average_bits: stored bits per quantized value, levels and gates included.
        seconds: time of all steps so far at this process's pace.
        bits: bit-width by tensor, mean over its groups.
        probabilities: of the larger of two bit-widths by tensor, while bits are sampled (SDQ).
        batch_norm_step: step at which BatchNorm's statistics are estimated anew and frozen; None if
            they never move.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    train_accuracy: float
    lr: float
    average_bits: float
    seconds: float
    bits: dict[str, float]
    probabilities: dict[str, float]
    batch_norm_step: int | None = None

    @property
    def remaining(self) -> float:
        """Seconds left at the pace so far."""
        return self.seconds / max(1, self.step) * (self.steps - self.step)


@dataclass(frozen=True)
class Look:
    """One line of metrics.jsonl: a run's state on the held-out training samples.

    Its `held_out_loss` tells it from the lines of StepMetrics.

    Attributes:
        step: steps done; 0 before training.
        held_out_loss: mean over the samples.
        held_out_accuracy: value of the metric, whichever it is, in its unit.
    """

    step: int
    held_out_loss: float
    held_out_accuracy: float


@dataclass
class StepMeans:
    """Means over the steps since the last report."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # mean of each step's samples

    @property
    def loss(self) -> float:
        """Mean loss."""
        return _mean(self.losses)

    @property
    def score(self) -> float:
        """Mean score."""
        return _mean(self.scores)


def _mean(values: list[float]) -> float:
    total = 0.0
    for value in values:  # `sum` rounds differently from Python 3.12 on
        total += value
    return total / len(values)
