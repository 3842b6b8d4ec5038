"""Sections about a result that the pages of `ddq report` and `ddq inspect` share."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ddqcli.formatting import size
from ddqcli.inspection.html import Fact, Section, Table
from ddqcli.runs.evaluation import Measured
from ddqcli.runs.report import Report


def head_section(source: Path, report: Report) -> Section:
    """Return what matters most: size, metric and bits, before and after, and all warnings."""
    totals, accuracy, metric = report.totals, report.accuracy, report.metric
    ratio = f"{totals.float_bytes / max(1, totals.bytes):.1f} times smaller"
    if (budget := totals.budget_bytes) is not None:
        ratio += f"; {100 * totals.bytes / budget:.1f} % of the budget"
    sizes = _arrow(size(totals.float_bytes), size(totals.bytes))
    facts = [Fact("Size of the file", sizes, ratio)]
    if accuracy:
        first = Measured(metric=metric, accuracy=accuracy)
        facts += [_values_fact(each) for each in (first, *report.other_metrics)]
    inputs = "inputs stay float"
    if report.activations:
        bits = "/".join(map(str, sorted({row.bits for row in report.activations})))
        inputs = f"inputs of {len(report.activations)} layers: {bits} bits"
    average = f"{totals.average_bits:.3f} bits a weight"
    facts.append(Fact("Average", average, f"as stored, with levels and scales; {inputs}"))
    text = [f"{source}: {report.source.path} ({report.source.arch})."]
    return Section("", text, facts=facts, warnings=report.warnings)


def _values_fact(measured: Measured) -> Fact:
    metric, before = measured.metric, measured.accuracy.float
    after = measured.accuracy.quantized
    values = _arrow(metric.text(before, " "), metric.text(after, " "))
    return Fact(metric.title, values, f"float → quantized; {metric.change(before, after)}")


def _arrow(before: str, after: str) -> str:
    """Return both values, which stay whole where the line breaks."""
    return " → ".join(value.replace(" ", "\N{NO-BREAK SPACE}") for value in (before, after))


def detail_sections(report: Report) -> list[Section]:
    """Return the course of the run and its exact sizes, and the tensors that stay float."""
    totals, course, metric, run = report.totals, report.course, report.metric, report.run
    text = [f"Trained for {run.steps:,} steps, seed {run.seed}, by ddq {report.source.ddq}."]
    if course:
        text.append(f"{metric.title}: {course.path(metric, '→', ' ')}.")
        text.append(f"Delivered: {course.outcome(run.steps, metric)}.")
    sizes = {
        "float model": totals.float_bytes,
        "quantized model": totals.bytes,
        "of it: quantized tensors": totals.quantized_bytes,
        "of it: tensors that stay float": totals.kept_bytes,
        "of it: manifest and header": totals.manifest_bytes,
    }
    if totals.budget_bytes is not None:
        sizes["budget"] = totals.budget_bytes
    rows = [
        [name, f"{nbytes:,}", f"{100 * nbytes / max(1, totals.bytes):.1f}"]
        for name, nbytes in sizes.items()
    ]
    sections = [Section("Details", text, Table(["", "bytes", "% of the file"], rows))]
    if report.kept_float:
        names = defaultdict(list)
        for name, reason in report.kept_float.items():
            names[reason].append(name)
        rows = [[reason, str(len(each)), ", ".join(each)] for reason, each in names.items()]
        table = Table(["reason", "number", "tensors"], rows, text=3)
        sections.append(Section("Tensors that stay float", table=table))
    return sections
