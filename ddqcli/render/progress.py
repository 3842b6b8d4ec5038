"""Progress on stderr: a bar on a terminal, a heartbeat line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ddqcli.formatting import duration, visible
from ddqcli.render.console import err
from ddqcli.runs.evaluation import Metric

if TYPE_CHECKING:
    from ddqcli.training.metrics import Look, StepMetrics

HEARTBEAT_SECONDS = 10.0


class ProgressReporter:
    """Print notes, passes over data and training steps; a listener for `finetune` and `sweep`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar = ProgressBar() if sys.stderr.isatty() and not quiet else None
        self.last_heartbeat = time.monotonic()
        self.last_look: Look | None = None
        self.metric = Metric()
        self.of_target = ""  # in the bar, before the name of the work

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
            self.bar.show(self.of_target + what, done, total)

    def step(self, metrics: StepMetrics) -> None:
        """Show a training step, on the bar or as a heartbeat line; the last step always."""
        figures = [f"train loss {metrics.loss:.3f}"]
        if look := self.last_look:
            figures.append(f"held-out loss {look.held_out_loss:.3f}")
            figures.append(f"held-out {self._text(look.held_out_accuracy)}")
        detail = ", ".join([*figures, f"{metrics.average_bits:.2f} bits"])
        now = time.monotonic()
        if self.bar:
            self.bar.show(f"{self.of_target}train", metrics.step, metrics.steps, detail)
        elif now - self.last_heartbeat >= HEARTBEAT_SECONDS or metrics.step >= metrics.steps:
            self.last_heartbeat = now
            times = _times(metrics.seconds, metrics.remaining)
            self.note(f"step {metrics.step}/{metrics.steps}: {detail}, {times}")

    def target(self, text: str) -> None:
        """Name the target in the bar from now on."""
        self.of_target = f"{text}: "

    def judged_by(self, metric: Metric) -> None:
        """Show the values that follow in this metric's unit."""
        self.metric = metric

    def look(self, look: Look) -> None:
        """Show the look's metric beside the training steps that follow."""
        self.last_look = look

    def _text(self, value: float) -> str:
        """Return a value of the metric: `accuracy 98.40 %`, `PSNR 31.642 dB`."""
        return f"{self.metric.name} {self.metric.text(value, ' ')}"


class _TimesColumn(ProgressColumn):
    """Elapsed and remaining time, in the words of the heartbeat lines."""

    def render(self, task: Task) -> Text:
        return Text(_times(task.elapsed or 0, task.time_remaining), style="cyan")


class ProgressBar(Progress):
    """Progress bar that shows one task at a time, and its details in a line of their own."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            _TimesColumn(),
            console=err,
            transient=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if detail := "".join(task.fields["detail"] for task in self.tasks):
            yield Text(f"  {detail}")

    def show(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Update the task shown, or replace it if the description differs or the work is new.

        A task that is done is hidden: what follows it may have no name. Fewer done than before mean
        that the work has begun again, with a clock of its own.
        """
        what = visible(what)
        if self.tasks and (self.tasks[0].description != what or done < self.tasks[0].completed):
            self.remove_task(self.tasks[0].id)
        if not self.tasks:
            self.add_task(what, total=total, detail=detail)
        task = self.tasks[0].id
        self.update(task, completed=done, total=total, detail=detail)
        if done >= total:
            self.remove_task(task)


def _times(elapsed: float, remaining: float | None) -> str:
    """Return `1:05 elapsed, 0:40 left`; without the second part while it is unknown."""
    left = "" if remaining is None else f", {duration(remaining)} left"
    return f"{duration(elapsed)} elapsed{left}"
