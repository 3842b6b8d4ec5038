"""Progress on stderr: a bar on a terminal, a heartbeat line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ddqcli.formatting import visible
from ddqcli.render.console import err
from ddqcli.runs.evaluation import Metric

if TYPE_CHECKING:
    from ddqcli.training.metrics import Look, StepMetrics

HEARTBEAT_SECONDS = 10.0


class ProgressReporter:
    """Print notes, passes over data and training steps; a listener for `finetune` and `sweep`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar = _ProgressBar() if sys.stderr.isatty() and not quiet else None
        self.last_heartbeat = time.monotonic()
        self.last_look: Look | None = None
        self.metric = Metric()

    def __enter__(self) -> ProgressReporter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def note(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            err.print(text, markup=False, soft_wrap=not sys.stderr.isatty())

    def progress(self, what: str, done: int, total: int) -> None:
        """Show on the bar that `done` of `total` items are processed."""
        if self.bar:
            self.bar.show(what, done, total)

    def step(self, metrics: StepMetrics) -> None:
        """Show a training step, on the bar or as a heartbeat line; the last step always."""
        look = self.last_look
        held_out = f"held-out {self._text(look.held_out_accuracy)}, " if look else ""
        detail = (
            f"loss {metrics.loss:.3f}, {self._text(metrics.train_accuracy)}, {held_out}"
            f"{metrics.average_bits:.2f} bits"
        )
        now = time.monotonic()
        if self.bar:
            self.bar.show("train", metrics.step, metrics.steps, detail)
        elif now - self.last_heartbeat >= HEARTBEAT_SECONDS or metrics.step >= metrics.steps:
            self.last_heartbeat = now
            left = _clock(metrics.remaining)
            self.note(f"train {metrics.step}/{metrics.steps}: {detail}, {left} left")

    def judged_by(self, metric: Metric) -> None:
        """Show the values that follow in this metric's unit."""
        self.metric = metric

    def look(self, look: Look) -> None:
        """Show the look's metric beside the training steps that follow."""
        self.last_look = look

    def _text(self, value: float) -> str:
        """Return a value of the metric: `98.4 %`, `PSNR 31.642 dB`."""
        if self.metric == Metric():
            return f"{value:.1f} %"
        return f"{self.metric.name} {self.metric.text(value, ' ')}"


class _ProgressBar(Progress):
    """Progress bar with the time left that shows one task at a time."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=err,
            transient=True,
        )
        self.current: tuple[str, TaskID] | None = None

    def show(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Update the task, or replace the one shown if its description differs."""
        what = visible(what)
        if self.current is None or self.current[0] != what:
            if self.current is not None:
                self.remove_task(self.current[1])
            self.current = what, self.add_task(what, total=total, detail=detail)
        self.update(self.current[1], completed=done, total=total, detail=detail)


def _clock(seconds: float) -> str:
    """Format a duration as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
