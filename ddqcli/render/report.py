"""Render a report as a table for the terminal, as CSV or as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ddqcli.inspection.trained_rows import short_kind
from ddqcli.render.console import print_lines
from ddqcli.render.data import csv_text, markdown, markdown_table
from ddqcli.render.layer_table import (
    Column,
    bar,
    bare_name,
    fitting_columns,
    layer_table,
    shape_text,
    shows_bars,
)
from ddqcli.runs.report import Report, TensorRow

COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "share", "error")
CSV_COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "float_bytes", "error")


def show(report: Report, console: Console) -> None:
    """Print the layers, then the totals."""
    columns = fitting_columns(
        _columns(report, console), console.width, [row.name for row in report.layers]
    )
    # Other programs get the names that --json has.
    name_of = bare_name if console.is_terminal else str
    console.print(layer_table(report.layers, columns, console, name_of))
    console.print()
    print_lines(total_lines(report), console)


def _columns(report: Report, console: Console) -> list[Column]:
    """Return the columns; on a terminal, bars show bits, of 8, and bytes, of the largest tensor."""
    total = max(1, report.totals.quantized_bytes)
    largest = max([1, *(row.bytes for row in report.layers)])
    bars = shows_bars(console)

    def with_bar(text: str, share: float, width: int, style: str) -> Text:
        return Text(text) + (Text(" " + bar(share, width), style) if bars else Text())

    def bits(row: TensorRow) -> Text:
        return with_bar(f"{row.bits:>4.3g}", row.bits / 8, 8, "cyan")

    def share(row: TensorRow) -> Text:
        return with_bar(f"{100 * row.bytes / total:>5.1f}%", row.bytes / largest, 10, "green")

    return [
        Column("kind", 9, lambda row: short_kind(row.kind), 2, right=False),
        Column("shape", 16, lambda row: shape_text(row, console), 3, right=False),
        Column("bits", 13 if bars else 4, bits, 0, right=not bars),
        Column("levels", 6, lambda row: str(row.levels), 1),
        Column("bytes", 9, lambda row: f"{row.bytes:,}", 0),
        Column("share", 17 if bars else 6, share, 0, right=not bars),
        Column("error", 7, lambda row: f"{100 * row.error:.2f}%", 0),
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
    table = markdown_table(COLUMNS, _markdown_rows(report), text=3)
    return "\n".join(["### ddq report", "", *totals, "", *table])


def _markdown_rows(report: Report) -> list[list[str]]:
    """Return the texts of each layer; `share` is of all quantized bytes."""
    total = max(1, report.totals.quantized_bytes)
    return [
        [
            row.name,
            row.kind,
            "×".join(map(str, row.shape)) or "1",
            f"{row.bits:g}",
            str(row.levels),
            f"{row.bytes:,}",
            f"{100 * row.bytes / total:.1f}%",
            f"{100 * row.error:.2f}%",
        ]
        for row in report.layers
    ]
