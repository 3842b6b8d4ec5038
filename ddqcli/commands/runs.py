"""`ddq runs`: the runs and sweeps of a folder, or all that this working folder knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from ddqcli.errors import DDQError
from ddqcli.runs.evaluation import Accuracy, Metric
from ddqcli.runs.find import folders_in, known_folders, runs_of_sweep
from ddqcli.runs.folder import is_busy, is_finished, is_sweep, resume_command
from ddqcli.runs.marker import read_marker
from ddqcli.runs.report import Report
from ddqcli.runs.run import Run

State = Literal["finished", "running", "unfinished", "damaged"]


@dataclass(frozen=True)
class RunRow:
    """One run, or a sweep with its runs. What is not known, as in an unfinished run, is None."""

    path: Path
    state: State
    created: str | None  # time of its making: ISO 8601, UTC
    targets: tuple[str, ...]  # one, or those of a sweep
    done: float | None  # share of the steps, or of a sweep's runs
    bytes: int | None
    metric: Metric | None
    accuracy: Accuracy | None  # values of the metric, whichever it is
    warnings: tuple[str, ...]  # of the report
    resume: str | None  # the command that goes on with an unfinished or damaged run
    runs: tuple[RunRow, ...] = ()  # of a sweep

    def data(self) -> dict[str, Any]:
        """Return the row as JSON-able values."""
        return {
            "path": str(self.path),
            "kind": "sweep" if len(self.targets) > 1 else "run",
            "state": self.state,
            "created": self.created,
            "targets": list(self.targets),
            "done": self.done,
            "bytes": self.bytes,
            "metric": self.metric and self.metric.data(),
            "accuracy": self.accuracy and self.accuracy.data(),
            "warnings": list(self.warnings),
            "resume": self.resume,
            "runs": [run.data() for run in self.runs],
        }


@dataclass(frozen=True)
class RunsResult:
    """All runs found, the newest first."""

    folder: Path | None  # None: runs/, and what --run-dir put elsewhere
    runs: tuple[RunRow, ...]

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        folder = None if self.folder is None else str(self.folder)
        return {"folder": folder, "runs": [run.data() for run in self.runs]}


def list_runs(folder: Path | None = None) -> RunsResult:
    """Return the runs in `folder`; for None, those under runs/ and those remembered elsewhere.

    Raises UsageError if there is no such folder.
    """
    folders = known_folders() if folder is None else folders_in(folder)
    return RunsResult(folder, tuple(map(_row, folders)))


def _row(folder: Path) -> RunRow:
    if is_sweep(folder):
        return _sweep_row(folder)
    run = Run(folder)
    try:
        targets = _targets(run)
    except DDQError:  # nothing goes on without a recipe
        return replace(_new_row(folder, "damaged", ()), resume=None)
    if not is_finished(folder):
        return _new_row(folder, _state_of_unfinished(folder), targets, done=_share_done(run))
    try:
        return _new_row(folder, "finished", targets, done=1.0, report=run.report())
    except DDQError:
        return _new_row(folder, "damaged", targets)


def _sweep_row(folder: Path) -> RunRow:
    rows = tuple(map(_row, runs_of_sweep(folder)))
    try:
        targets = _targets(Run(folder))
    except DDQError:
        return replace(_new_row(folder, "damaged", (), runs=rows), resume=None)
    done = sum(row.state == "finished" for row in rows) / len(targets)
    state = "finished" if is_finished(folder) and done == 1 else _state_of_unfinished(folder)
    return _new_row(folder, state, targets, done=done, runs=rows)


def _new_row(
    folder: Path,
    state: State,
    targets: Sequence[str],
    *,
    done: float | None = None,
    report: Report | None = None,
    runs: tuple[RunRow, ...] = (),
) -> RunRow:
    marker = read_marker(folder)
    made = datetime.fromtimestamp(marker.created // 10**9, timezone.utc) if marker else None
    return RunRow(
        path=folder,
        state=state,
        created=made.isoformat() if made else None,
        targets=tuple(targets),
        done=done,
        bytes=report.totals.bytes if report else None,
        metric=report.metric if report else None,
        accuracy=report.accuracy if report else None,
        warnings=report.warnings if report else (),
        resume=resume_command(folder) if state in ("unfinished", "damaged") else None,
        runs=runs,
    )


def _share_done(run: Run) -> float:
    last = [entry for entry in run.metrics() if isinstance(entry.get("steps"), int)][-1:]
    return last[0]["step"] / max(1, last[0]["steps"]) if last else 0.0


def _targets(run: Run) -> list[str]:
    return [recipe.budget.target for recipe in run.recipes()]


def _state_of_unfinished(folder: Path) -> State:
    return "running" if is_busy(folder) else "unfinished"
