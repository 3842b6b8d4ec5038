"""`ddq report`: check the report of a run or an exported file against limits, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.errors import UsageError
from ddqcli.inspection.report import read_report
from ddqcli.recipe.size import parse_size
from ddqcli.runs.report import Report


@dataclass(frozen=True)
class Limits:
    """Limits of a report; None is no limit."""

    max_size: str | None = None  # of all tensors: 150kB, 12%
    max_bits: float | None = None  # average stored bits a quantized weight
    max_drop: float | None = None  # points of accuracy lost
    min_accuracy: float | None = None  # percent, of the quantized model

    def unmet(self, report: Report) -> tuple[str, ...]:
        """Return one sentence for each limit exceeded. Raises UsageError for a malformed size."""
        totals, accuracy = report.totals, report.accuracy
        max_bytes = None
        if self.max_size is not None:
            try:
                max_bytes = parse_size(self.max_size, totals.float_bytes)
            except ValueError as error:
                raise UsageError(f"--max-size: {error}.") from error
        drop, quantized = (accuracy.drop, accuracy.quantized) if accuracy else (None, None)
        sentences = (
            _above("--max-size", totals.bytes, max_bytes, "bytes"),
            _above("--max-bits", totals.average_bits, self.max_bits, "bits a weight"),
            _above("--max-drop", drop, self.max_drop, "points"),
            _below("--min-accuracy", quantized, self.min_accuracy, "%"),
        )
        return tuple(sentence for sentence in sentences if sentence)


def _above(flag: str, value: float | None, limit: float | None, unit: str) -> str | None:
    if limit is None:
        return None
    if value is None:
        return _unmeasured(flag)
    excess = value - limit
    if excess <= 0:  # never true for NaN
        return None
    return f"{flag} is unmet: {value:,} {unit} are {excess:,.6g} above the limit of {limit:,}."


def _below(flag: str, value: float | None, limit: float | None, unit: str) -> str | None:
    if limit is None:
        return None
    if value is None:
        return _unmeasured(flag)
    shortfall = limit - value
    if shortfall <= 0:
        return None
    return f"{flag} is unmet: {value:,} {unit} are {shortfall:,.6g} below the limit of {limit:,}."


def _unmeasured(flag: str) -> str:
    return f"{flag} is unmet: nothing was evaluated in this run to hold against the limit."


@dataclass(frozen=True)
class ReportResult:
    """A report, its source, and the limits it exceeds."""

    source: Path
    report: Report
    unmet: tuple[str, ...] = ()
    page: Path | None = None  # HTML page, if one was written

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        page = {"page": str(self.page)} if self.page else {}
        return {"target": str(self.source), **page, **self.report.data()}


def report(target: Path | None = None, limits: Limits | None = None) -> ReportResult:
    """Return the report of a run folder or an exported file; None: the newest run.

    Raises UsageError, DDQError for a damaged run and VerificationError for a damaged file.
    """
    source, content = read_report(target)
    return ReportResult(source, content, limits.unmet(content) if limits else ())
