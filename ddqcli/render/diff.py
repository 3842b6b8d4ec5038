"""Two reports side by side, as a table for the terminal, as CSV or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ddqcli.commands.diff import COLUMNS, DiffResult, Pair
from ddqcli.formatting import percent, shorten
from ddqcli.render.data import csv_text, markdown, markdown_table

NONE = "-"
_FORMATS: dict[str, Callable[[Any], str]] = {
    "bits": "{:g}".format,
    "levels": str,
    "bytes": "{:,}".format,
    "error": lambda value: f"{percent(value)}%",
}


def show(result: DiffResult, console: Console) -> None:
    """Print A and B, the values of each layer side by side, then the totals."""
    for line in (f"A  {result.a}", f"B  {result.b}", ""):
        console.print(line, soft_wrap=True)
    columns = COLUMNS if console.width >= 100 else ("bits", "bytes", "error")
    layers = _table(_header(columns))
    cells_width = sum(18 if column == "bytes" else 16 for column in columns) + 2
    name_width = max(12, console.width - cells_width)
    for layer in result.layers:
        layers.add_row(shorten(layer["name"], name_width), *_cells(layer, columns))
    console.print(layers)
    console.print()
    totals = _table(["", "A", "B", "change"])
    for row in total_rows(result):
        totals.add_row(*row)
    console.print(totals)


def total_rows(result: DiffResult) -> list[Sequence[str]]:
    """Return name, A, B and change of each total, as text."""
    totals, accuracy, metric = result.totals, result.accuracy, result.metric
    name = metric.name if metric else "metric"
    form, unit = ("{:.2f}", "%") if metric and metric.unit == "%" else ("{:.5g}", "")
    candidates = [
        ("bytes", totals["bytes"], "{:,}", ""),
        ("float bytes", totals["float_bytes"], "{:,}", ""),
        ("budget, bytes", totals["budget_bytes"], "{:,}", ""),
        ("bits a weight", totals["average_bits"], "{:.3f}", ""),
        (name, accuracy["quantized"], form, unit),
        (f"float {name}", accuracy["float"], form, unit),
    ]
    rows: list[Sequence[str]] = []
    for name, pair, form, unit in candidates:
        if pair["a"] is not None or pair["b"] is not None:
            change = "" if pair["change"] is None else _signed(pair["change"], form)
            rows.append((name, *sides(pair, (form + unit).format), change))
    if result.activations:
        bits = [
            sorted({entry["bits"][side] for entry in result.activations} - {None}) for side in "ab"
        ]
        a, b = ("/".join(map(str, values)) or "float" for values in bits)
        rows.append(("inputs' bits", a, b, ""))
    return rows


def sides(pair: Pair, form: Callable[[Any], str]) -> tuple[str, str]:
    """Return A and B as text."""
    a, b = (NONE if pair[side] is None else form(pair[side]) for side in "ab")
    return a, b


def as_csv(result: DiffResult) -> str:
    """Return the layers as CSV, numbers unformatted; empty where a side has no such layer."""
    header = [f"{column}_{side}" for column in COLUMNS for side in "ab"]
    rows = []
    for layer in result.layers:
        values = [layer[column][side] for column in COLUMNS for side in "ab"]
        rows.append([layer["name"], layer["kind"], "x".join(map(str, layer["shape"])), *values])
    return csv_text(["name", "kind", "shape", *header], rows)


def as_markdown(result: DiffResult) -> str:
    """Return totals and layers as Markdown, for the summary of a CI job."""
    a, b = (markdown(str(side)) for side in (result.a, result.b))
    title = ["### ddq report", "", f"- A: {a}", f"- B: {b}", ""]
    totals = markdown_table(["", "A", "B", "change"], total_rows(result))
    rows = [[layer["name"], *_cells(layer, COLUMNS)] for layer in result.layers]
    return "\n".join([*title, *totals, "", *markdown_table(_header(COLUMNS), rows)])


def _header(columns: Sequence[str]) -> list[str]:
    return ["name", *(f"{column} {side}" for column in columns for side in "AB")]


def _cells(layer: dict[str, Any], columns: Sequence[str]) -> list[str]:
    return [cell for column in columns for cell in sides(layer[column], _FORMATS[column])]


def _table(header: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(header):
        table.add_column(name, justify="right" if k else "left", no_wrap=True)
    return table


def _signed(change: float, form: str) -> str:
    text = form.format(abs(change))
    return text if float(text.replace(",", "")) == 0 else ("+" if change > 0 else "-") + text
