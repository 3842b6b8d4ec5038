"""The result of `ddq report --diff` as a table, CSV or Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ddqcli.commands.diff import COLUMNS, DiffResult, Pair
from ddqcli.formatting import shorten

NONE = "-"
_FORMATS: dict[str, Callable[[Any], str]] = {
    "bits": "{:g}".format,
    "levels": str,
    "bytes": "{:,}".format,
    "error": lambda value: f"{100 * value:.2f}%",
}


def show(result: DiffResult, console: Console) -> None:
    """What A and B are, each layer's values side by side, then the totals."""
    console.print(f"A  {result.a}\nB  {result.b}\n", markup=False, soft_wrap=True)
    columns = COLUMNS if console.width >= 100 else ("bits", "bytes", "error")
    grid = _grid(["name", *(f"{column} {side}" for column in columns for side in "AB")])
    room = max(12, console.width - sum(18 if column == "bytes" else 16 for column in columns) - 2)
    for layer in result.layers:
        cells = (cell for column in columns for cell in sides(layer[column], _FORMATS[column]))
        grid.add_row(shorten(layer["name"], room), *cells)
    console.print(grid)
    console.print()
    totals = _grid(["", "A", "B", "change"])
    for row in total_rows(result):
        totals.add_row(*row)
    console.print(totals)


def total_rows(result: DiffResult) -> list[Sequence[str]]:
    """Name, A, B and change of each total, as text."""
    totals, accuracy = result.totals, result.accuracy
    rows = [
        ("bytes", totals["bytes"], "{:,}", ""),
        ("float bytes", totals["float_bytes"], "{:,}", ""),
        ("budget, bytes", totals["budget_bytes"], "{:,}", ""),
        ("bits a weight", totals["average_bits"], "{:.3f}", ""),
        ("accuracy", accuracy["quantized"], "{:.2f}", "%"),
        ("float accuracy", accuracy["float"], "{:.2f}", "%"),
    ]
    found = [
        (
            name,
            *sides(pair, (form + unit).format),
            "" if pair["change"] is None else _signed(pair["change"], form),
        )
        for name, pair, form, unit in rows
        if pair["a"] is not None or pair["b"] is not None
    ]
    if result.activations:
        bits = [
            sorted({entry["bits"][side] for entry in result.activations} - {None}) for side in "ab"
        ]
        found.append(
            ("inputs' bits", *("/".join(map(str, values)) or "float" for values in bits), "")
        )
    return found


def sides(pair: Pair, form: Callable[[Any], str]) -> tuple[str, str]:
    """A and B as text."""
    a, b = (NONE if pair[side] is None else form(pair[side]) for side in "ab")
    return a, b


def as_csv(result: DiffResult) -> str:
    """The layers as CSV, numbers unformatted; empty where a side has no such layer."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["name", "kind", "shape", *(f"{column}_{side}" for column in COLUMNS for side in "ab")]
    )
    for layer in result.layers:
        values = (layer[column][side] for column in COLUMNS for side in "ab")
        writer.writerow([layer["name"], layer["kind"], "x".join(map(str, layer["shape"])), *values])
    return stream.getvalue().rstrip("\n")


def as_markdown(result: DiffResult) -> str:
    """Totals and layers as Markdown, fit for a CI job's summary."""
    header = ["name", *(f"{column} {side}" for column in COLUMNS for side in "AB")]
    layers = [
        [
            layer["name"],
            *(cell for column in COLUMNS for cell in sides(layer[column], _FORMATS[column])),
        ]
        for layer in result.layers
    ]
    return "\n".join(
        [
            "### ddq report", "", f"- A: {result.a}", f"- B: {result.b}", "",
            *_markdown(["", "A", "B", "change"], total_rows(result)), "", *_markdown(header, layers),
        ]
    )  # fmt: skip


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]]


def _grid(header: Sequence[str]) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(header):
        grid.add_column(name, justify="right" if k else "left", no_wrap=True)
    return grid


def _signed(change: float, form: str) -> str:
    text = form.format(abs(change))
    return text if float(text.replace(",", "")) == 0 else ("+" if change > 0 else "-") + text
