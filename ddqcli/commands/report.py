"""`ddq report`: check the report of a run or an exported file against limits, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddqcli.errors import DDQError, UsageError
from ddqcli.inspection.report import read_report
from ddqcli.recipe.size import parse_size
from ddqcli.runs.evaluation import Measured, Metric
from ddqcli.runs.find import find_sweep
from ddqcli.runs.report import Report, SweepTable
from ddqcli.runs.run import Run


@dataclass(frozen=True)
class Limits:
    """Limits of a report; None is no limit."""

    max_size: str | None = None  # of all tensors: 150kB, 12%
    max_bits: float | None = None  # average stored bits a quantized weight
    max_drop: float | None = None  # by how much the metric became worse, in its unit
    min_accuracy: float | None = None  # short for a least value of accuracy, in percent
    least: tuple[tuple[str, float], ...] = ()  # (metric, value) of the quantized model
    most: tuple[tuple[str, float], ...] = ()

    def unmet(self, report: Report) -> tuple[str, ...]:
        """Return one sentence for each limit exceeded. Raises UsageError for a malformed size."""
        totals, metric = report.totals, report.metric
        max_bytes = None
        if self.max_size is not None:
            try:
                max_bytes = parse_size(self.max_size, totals.float_bytes)
            except ValueError as error:
                raise UsageError(f"--max-size: {error}.") from error
        drop = report.accuracy.drop if report.accuracy else None
        points = "points" if metric.unit == "%" else metric.unit or metric.name
        sentences = [
            _above("--max-size", totals.bytes, max_bytes, "bytes"),
            _above("--max-bits", totals.average_bits, self.max_bits, "bits a weight"),
            _above("--max-drop", drop, self.max_drop, points),
        ]
        if self.min_accuracy is not None:
            sentences.append(
                _of_metric("--min-accuracy", _below, report, Metric().name, self.min_accuracy)
            )
        sentences += [_of_metric("--min", _below, report, *limit) for limit in self.least]
        sentences += [_of_metric("--max", _above, report, *limit) for limit in self.most]
        return tuple(sentence for sentence in sentences if sentence)


def _of_metric(
    flag: str, compare: Callable[..., str | None], report: Report, name: str, limit: float
) -> str | None:
    """Hold the quantized model's value of the metric `name` against a limit."""
    flag = flag if flag == "--min-accuracy" else f"{flag} {name}"
    if report.accuracy is None:
        return _unmeasured(flag)
    first = Measured(metric=report.metric, accuracy=report.accuracy)
    for each in (first, *report.other_metrics):
        if each.metric.name == name:
            unit = each.metric.unit or name
            return compare(flag, each.accuracy.quantized, limit, unit)
    names = " and ".join(each.metric.name for each in (first, *report.other_metrics))
    return f"{flag} is unmet: this run is judged by {names}, not by {name}."


def _above(flag: str, value: float | None, limit: float | None, unit: str) -> str | None:
    return _beyond(flag, value, limit, unit, "above")


def _below(flag: str, value: float | None, limit: float | None, unit: str) -> str | None:
    return _beyond(flag, value, limit, unit, "below")


def _beyond(
    flag: str, value: float | None, limit: float | None, unit: str, side: Literal["above", "below"]
) -> str | None:
    """Say by how much a value lies on the wrong side of a limit; None if it does not."""
    if limit is None:
        return None
    if value is None:
        return _unmeasured(flag)
    excess = value - limit if side == "above" else limit - value
    if excess <= 0:  # never true for NaN
        return None
    return f"{flag} is unmet: {value:,} {unit} are {excess:,.6g} {side} the limit of {limit:,}."


def _unmeasured(flag: str) -> str:
    return f"{flag} is unmet: nothing was evaluated in this run to hold against the limit."


@dataclass(frozen=True)
class ReportResult:
    """A report, its source, and the limits it exceeds."""

    source: Path
    report: Report
    unmet: tuple[str, ...] = ()
    page: Path | None = None  # HTML page, if one was written
    file_format: str = "safetensors"  # that the run's target is for

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        page = {"page": str(self.page)} if self.page else {}
        return {"target": str(self.source), **page, **self.report.data()}


@dataclass(frozen=True)
class SweepReport:
    """The table of a finished sweep."""

    source: Path
    table: SweepTable
    page: Path | None = None  # HTML page, if one was written
    file_format: str = "safetensors"  # that the targets are for

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        page = {"page": str(self.page)} if self.page else {}
        return {"target": str(self.source), **page, **self.table.data()}


def report(
    source: Path | None = None,
    limits: Limits | None = None,
    *,
    target: str | None = None,
) -> ReportResult | SweepReport:
    """Return the report of a run folder or an exported file; None: the newest run or sweep.

    Of a sweep, `target` picks one run; without it, the sweep's table is returned, unless there are
    limits, which hold for one run. Raises UsageError, DDQError for a damaged run and
    VerificationError for a damaged file.
    """
    limits = limits or Limits()
    if target is None and limits == Limits() and (sweep := find_sweep(source)):
        return SweepReport(sweep, Run(sweep).sweep_table(), file_format=_target_format(sweep))
    path, content = read_report(source, target)
    return ReportResult(path, content, limits.unmet(content), file_format=_target_format(path))


def _target_format(source: Path) -> str:
    """Return the format that a run's target is for; of an exported file, its own."""
    if not source.is_dir():
        return "safetensors"
    try:
        return Run(source).recipe().budget.target_format
    except (DDQError, OSError):  # a report needs no recipe
        return "safetensors"
