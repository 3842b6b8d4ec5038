"""`ddq report`: what a run, or an exported file, holds; reads JSON and numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.errors import UsageError
from ddqcli.inspection.report import read_report
from ddqcli.recipe.size import parse_size


@dataclass(frozen=True)
class Limits:
    """What a report may be held against; None asks for nothing."""

    max_size: str | None = None  # of all tensors: 150kB, 12%
    max_bits: float | None = None  # average stored bits a quantized weight
    max_drop: float | None = None  # points of accuracy lost
    min_accuracy: float | None = None  # percent, of the quantized model

    def unmet(self, report: dict[str, Any]) -> tuple[str, ...]:
        """One sentence for each limit that the report breaks. Raises UsageError for a size that is none."""
        totals, accuracy = report["totals"], report["accuracy"] or {}
        try:
            most = (
                None if self.max_size is None else parse_size(self.max_size, totals["float_bytes"])
            )
        except ValueError as error:
            raise UsageError(f"--max-size: {error}.") from error
        found = (
            _above("--max-size", totals["bytes"], most, "bytes"),
            _above("--max-bits", totals["average_bits"], self.max_bits, "bits a weight"),
            _above("--max-drop", accuracy.get("drop"), self.max_drop, "points"),
            _below("--min-accuracy", accuracy.get("quantized"), self.min_accuracy, "%"),
        )
        return tuple(sentence for sentence in found if sentence)


def _above(gate: str, value: float | None, most: float | None, unit: str) -> str | None:
    if most is None:
        return None
    if value is None:
        return f"{gate} is unmet: nothing was evaluated in this run."
    over = value - most
    return (
        None if over <= 0 else f"{gate} is unmet: {value:,} {unit} are {over:,.6g} above {most:,}."
    )


def _below(gate: str, value: float | None, least: float | None, unit: str) -> str | None:
    if least is None:
        return None
    if value is None:
        return f"{gate} is unmet: nothing was evaluated in this run."
    under = least - value
    return (
        None
        if under <= 0
        else f"{gate} is unmet: {value:,} {unit} are {under:,.6g} below {least:,}."
    )


@dataclass(frozen=True)
class ReportResult:
    """A report, where it came from, and what of the limits it breaks."""

    source: Path
    report: dict[str, Any]
    unmet: tuple[str, ...] = ()
    page: Path | None = None  # where it was written as HTML

    def data(self) -> dict[str, Any]:
        page = {"page": str(self.page)} if self.page else {}
        return {"target": str(self.source), **page, **self.report}


def report(target: Path | None = None, limits: Limits | None = None) -> ReportResult:
    """The report of a run folder (the newest run if None) or of an exported file.

    Raises UsageError, VerificationError.
    """
    source, found = read_report(target)
    return ReportResult(source, found, limits.unmet(found) if limits else ())
