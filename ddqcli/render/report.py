"""Render a report as a table for the terminal, as CSV or as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ddqcli.formatting import percent
from ddqcli.inspection.trained_rows import short_kind
from ddqcli.render.console import print_lines
from ddqcli.render.data import csv_text, markdown, markdown_table
from ddqcli.render.layer_table import (
    Column,
    bar,
    fitting_columns,
    layer_table,
    shape_text,
    shows_bars,
)
from ddqcli.runs.evaluation import Accuracy, Metric
from ddqcli.runs.report import Report, TensorRow

COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "share", "error")
CSV_COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "float_bytes", "error")
_FILE = "file"
_BAR = ""  # header


def show(report: Report, console: Console) -> None:
    """Print the layers, then the totals."""
    names = [row.name for row in report.layers] + [name for name, _ in _other_parts(report)]
    columns = fitting_columns(_columns(report, console), report.layers, console.width, names)
    table = layer_table(report.layers, columns, console)
    for name, nbytes in _other_parts(report):
        cells = {"bytes": f"{nbytes:,}", "share": _share(nbytes, report)}
        style = "bold" if name == _FILE else None
        table.add_row(name, *(cells.get(column.header, "") for column in columns), style=style)
    console.print(table)
    console.print()
    print_lines(total_lines(report, parts=False), console)


def _columns(report: Report, console: Console) -> list[Column]:
    """Return the columns; on a terminal, bars show bits, of 8, and bytes, of the largest tensor."""
    largest = max([1, *(row.bytes for row in report.layers)])

    def bits_bar(row: TensorRow) -> Text:
        return Text(bar(row.bits / 8, 8), "cyan")

    def bytes_bar(row: TensorRow) -> Text:
        return Text(bar(row.bytes / largest, 10), "green")

    columns = [
        Column("kind", 9, lambda row: short_kind(row.kind), 3, right=False),
        Column("shape", 16, lambda row: shape_text(row, console), 4, right=False),
        Column("bits", 4, lambda row: f"{row.bits:.3g}", 0),
        Column(_BAR, 8, bits_bar, 2, right=False),
        Column("levels", 6, lambda row: str(row.levels), 1),
        Column("bytes", 9, lambda row: f"{row.bytes:,}", 0),
        Column("share", 6, lambda row: _share(row.bytes, report), 0),
        Column(_BAR, 10, bytes_bar, 2, right=False),
        Column("error", 7, lambda row: f"{percent(row.error)}%", 0),
    ]
    return columns if shows_bars(console) else [c for c in columns if c.header != _BAR]


def _other_parts(report: Report) -> list[tuple[str, int]]:
    """Return name and bytes of what the file holds beside the quantized tensors, and of the file.

    Reports of older versions do not know the manifest's bytes.
    """
    totals = report.totals
    parts = [("not quantized", totals.kept_bytes), ("manifest, header", totals.manifest_bytes)]
    return [part for part in parts if part[1]] + [(_FILE, totals.bytes)]


def _share(nbytes: int, report: Report) -> str:
    """Return the share of the file."""
    return f"{100 * nbytes / max(1, report.totals.bytes):.1f}%"


def size_line(float_bytes: int, nbytes: int) -> str:
    """Return the sizes of the float model and of the file as every command prints them."""
    ratio = float_bytes / max(1, nbytes)
    change = f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.1f}x larger"
    return f"size       {float_bytes:,} -> {nbytes:,} bytes ({change})"


def total_lines(report: Report, *, parts: bool = True) -> list[str]:
    """Return size, budget, metric and warnings in a few lines; with `parts`, those of the file."""
    totals, accuracy, metric = report.totals, report.accuracy, report.metric
    size = size_line(totals.float_bytes, totals.bytes)
    lines = [f"{size}, {totals.average_bits:.3f} bits a weight"]
    if parts and totals.manifest_bytes:
        lines.append(
            f"of it      {totals.quantized_bytes:,} bytes quantized, {totals.kept_bytes:,} not "
            f"quantized, {totals.manifest_bytes:,} manifest and header"
        )
    if report.run.method != "ddq":
        lines.append(f"method     {report.run.method}")
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
        lines.append(_values_line(metric, accuracy))
    lines += [_values_line(each.metric, each.accuracy) for each in report.other_metrics]
    return lines + [f"warning    {warning}" for warning in report.warnings]


def _values_line(metric: Metric, accuracy: Accuracy) -> str:
    return (
        f"{metric.name:<10} {metric.text(accuracy.float)} float -> "
        f"{metric.text(accuracy.quantized)} quantized "
        f"({metric.change(accuracy.float, accuracy.quantized)})"
    )


def as_csv(report: Report) -> str:
    """Return the layers as CSV, numbers unformatted."""
    values = [{**row.data(), "shape": "x".join(map(str, row.shape))} for row in report.layers]
    return csv_text(CSV_COLUMNS, [[row[column] for column in CSV_COLUMNS] for row in values])


def as_markdown(report: Report) -> str:
    """Return totals and layers as Markdown, for the summary of a CI job."""
    lines = total_lines(report, parts=False)
    totals = [f"- {markdown(' '.join(line.split()))}" for line in lines]
    table = markdown_table(COLUMNS, _markdown_rows(report), text=3)
    return "\n".join(["### ddq report", "", *totals, "", *table])


def _markdown_rows(report: Report) -> list[list[str]]:
    """Return the texts of each layer and of the other parts; `share` is of the whole file."""
    layers = [
        [
            row.name,
            short_kind(row.kind),
            "×".join(map(str, row.shape)) or "1",
            f"{row.bits:g}",
            str(row.levels),
            f"{row.bytes:,}",
            _share(row.bytes, report),
            f"{percent(row.error)}%",
        ]
        for row in report.layers
    ]
    return layers + [
        [name, "", "", "", "", f"{nbytes:,}", _share(nbytes, report), ""]
        for name, nbytes in _other_parts(report)
    ]
