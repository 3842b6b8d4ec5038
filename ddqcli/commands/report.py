"""`ddq report`: what a run, or an exported file, holds; reads JSON and numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.artifact.format import read_artifact
from ddqcli.engine.runs import Run
from ddqcli.errors import VerificationError


@dataclass(frozen=True)
class ReportResult:
    """A report and where it came from."""

    source: Path
    report: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return {"source": str(self.source), **self.report}


def report(target: Path | None = None) -> ReportResult:
    """The report of a run folder (the newest run if None) or of an exported file. Raises UsageError, VerificationError."""
    if target is not None and target.is_file():
        meta = read_artifact(target).meta
        if "report" not in meta:
            raise VerificationError(f"{target} carries no report; it was not written by `ddq export`.")
        return ReportResult(target, meta["report"])
    run = Run.open(target)
    return ReportResult(run.path, run.report())
