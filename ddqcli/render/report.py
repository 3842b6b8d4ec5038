"""Render a report as a table for the terminal, as CSV or as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ddqcli.formatting import shorten
from ddqcli.render.data import csv_text, markdown, markdown_table
from ddqcli.runs.report import Report

COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "share", "error")
CSV_COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "float_bytes", "error")
_NUMBERS = {"bits", "levels", "bytes", "share", "error"}


def show(report: Report, console: Console) -> None:
    """Print the layers, then the totals."""
    wide = console.width >= 100
    columns = [column for column in COLUMNS if wide or column != "kind"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in _NUMBERS else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows(report):
        table.add_row(*(shorten(row[column], 60 if wide else 30) for column in columns))
    console.print(table)
    console.print()
    for line in total_lines(report):
        console.print(line, markup=False, soft_wrap=True)


def rows(report: Report) -> list[dict[str, str]]:
    """Return one row of text for each layer; `share` is of all quantized bytes."""
    total = max(1, report.totals.quantized_bytes)
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "shape": "×".join(map(str, row.shape)) or "1",
            "bits": f"{row.bits:g}",
            "levels": str(row.levels),
            "bytes": f"{row.bytes:,}",
            "share": f"{100 * row.bytes / total:.1f}%",
            "error": f"{100 * row.error:.2f}%",
        }
        for row in report.layers
    ]


def total_lines(report: Report) -> list[str]:
    """Return size, budget, metric and warnings in a few lines."""
    totals, accuracy, metric = report.totals, report.accuracy, report.metric
    ratio = totals.float_bytes / max(1, totals.bytes)
    lines = [
        f"size       {totals.float_bytes:,} -> {totals.bytes:,} bytes ({ratio:.1f}x smaller), "
        f"{totals.average_bits:.3f} bits a weight"
    ]
    if totals.manifest_bytes:
        lines.append(
            f"of it      {totals.quantized_bytes:,} bytes quantized, {totals.kept_bytes:,} not "
            f"quantized, {totals.manifest_bytes:,} manifest and header"
        )
    if totals.budget_bytes is not None:
        used = 100 * totals.bytes / totals.budget_bytes
        lines.append(f"budget     {totals.budget_bytes:,} bytes, {used:.1f}% used")
    if report.activations:
        bits = "/".join(map(str, sorted({row.bits for row in report.activations})))
        lines.append(f"inputs     {len(report.activations)} layers' inputs at {bits} bits")
    if course := report.course:
        lines += [
            f"{metric.name:<10} {course.path(metric)}",
            f"delivered  {course.outcome(report.run.steps, metric)}",
        ]
    elif accuracy:
        lines.append(
            f"{metric.name:<10} {metric.text(accuracy.float)} float -> "
            f"{metric.text(accuracy.quantized)} quantized "
            f"({metric.change(accuracy.float, accuracy.quantized)})"
        )
    return lines + [f"warning    {warning}" for warning in report.warnings]


def as_csv(report: Report) -> str:
    """Return the layers as CSV, numbers unformatted."""
    values = [{**row.data(), "shape": "x".join(map(str, row.shape))} for row in report.layers]
    return csv_text(CSV_COLUMNS, [[row[column] for column in CSV_COLUMNS] for row in values])


def as_markdown(report: Report) -> str:
    """Return totals and layers as Markdown, for the summary of a CI job."""
    totals = [f"- {markdown(line.replace('  ', ' ').strip())}" for line in total_lines(report)]
    cells = [[row[column] for column in COLUMNS] for row in rows(report)]
    table = markdown_table(COLUMNS, cells, text=len(set(COLUMNS) - _NUMBERS))
    return "\n".join(["### ddq report", "", *totals, "", *table])
