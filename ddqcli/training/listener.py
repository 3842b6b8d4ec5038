"""Protocol for following a run: notes, progress over data, training metrics."""

from __future__ import annotations

from typing import Protocol

from ddqcli.runs.evaluation import Metric
from ddqcli.training import distributed
from ddqcli.training.metrics import Look, StepMetrics


class Listener(Protocol):
    """Receives what a run reports while it works, such as a progress bar on a terminal."""

    def note(self, text: str) -> None:
        """Receive a decision or a warning in one line."""

    def target(self, text: str) -> None:
        """Receive the target of a sweep whose run follows: `4 bits`."""

    def judged_by(self, metric: Metric) -> None:
        """Receive the metric whose values follow."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Receive the batches done of a pass over data; `what` names the pass."""

    def step(self, metrics: StepMetrics) -> None:
        """Receive the metrics of the latest training steps."""

    def look(self, look: Look) -> None:
        """Receive an evaluation on the held-out training samples."""


class SilentListener:
    """Listener that ignores everything."""

    def note(self, text: str) -> None:
        pass

    def target(self, text: str) -> None:
        pass

    def judged_by(self, metric: Metric) -> None:
        pass

    def progress(self, what: str, done: int, total: int) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass

    def look(self, look: Look) -> None:
        pass


def main_listener(listener: Listener | None) -> Listener:
    """Return `listener` on rank 0, and a silent one on other ranks or for None."""
    return listener if listener and distributed.is_main() else SilentListener()
