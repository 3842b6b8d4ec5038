"""Progress on stderr: a bar with time left on a terminal, one heartbeat line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ddqcli.render.console import err

_HEARTBEAT = 10.0  # seconds


class Live:
    """Shows notes, passes over data, and training steps; a listener for `commands.finetune.finetune`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar = None if quiet or not sys.stderr.isatty() else Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), TextColumn("{task.fields[detail]}"), console=err, transient=True,
        )  # fmt: skip
        self.task: Any = None
        self.what = ""
        self.last = time.monotonic()

    def __enter__(self) -> Live:
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
        if not self.quiet:
            err.print(text, markup=False, soft_wrap=not sys.stderr.isatty())

    def progress(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, "")

    def step(self, metrics: Any) -> None:
        detail = f"loss {metrics.loss:.3f}, {metrics.train_accuracy:.1f} %, {metrics.average_bits:.2f} bits"
        if self._show("train", metrics.step, metrics.steps, detail) and not self.bar:
            self.note(
                f"train {metrics.step}/{metrics.steps}: {detail}, {_clock(metrics.remaining)} left"
            )

    def _show(self, what: str, done: int, total: int, detail: str) -> bool:
        """Update the bar; True where a heartbeat is due."""
        if self.bar:
            if what != self.what or self.task is None:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task, self.what = self.bar.add_task(what, total=total, detail=detail), what
            self.bar.update(self.task, completed=done, total=total, detail=detail)
        now = time.monotonic()
        if self.quiet or (now - self.last < _HEARTBEAT and done < total):
            return False
        if what == "train" or now - self.last >= _HEARTBEAT:
            self.last = now
            return True
        return False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        if minutes >= 60
        else f"{minutes}:{seconds:02d}"
    )
