"""The result of `ddq inspect` for a run or an exported file as a table for the terminal."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.text import Text

from ddqcli.formatting import count, percent
from ddqcli.inspection.trained_rows import ERROR_NOTE, FITTED_NOTE, TrainedResult, TrainedRow
from ddqcli.render.console import print_lines
from ddqcli.render.layer_table import (
    LEVELS,
    MORE_COLUMNS,
    Column,
    bare_name,
    blocks_of,
    distribution_word,
    fitting_columns,
    layer_table,
    shape_text,
    spark,
)
from ddqcli.render.report import total_lines


def show(result: TrainedResult, console: Console) -> None:
    """Print the layers, the totals, the pictures, and what to type next."""
    all_columns = _columns(result, console)
    names = [bare_name(row.name) for row in result.layers]
    columns = fitting_columns(all_columns, result.layers, console.width, names)
    console.print(f"{result.path}: {result.note}", soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(layer_table(result.layers, columns, console, bare_name))
    console.print()
    notes = [f"Histogram: {result.histogram_of}.", ERROR_NOTE]
    if result.what == "run":
        notes.append(FITTED_NOTE)
    if len(columns) < len(all_columns):
        notes.append(MORE_COLUMNS)
    console.print(Text(" ".join(notes), style="dim"))
    console.print()
    print_lines([*total_lines(result.report), *_closing_lines(result)], console)


def _columns(result: TrainedResult, console: Console) -> list[Column]:
    blocks = blocks_of(console)
    columns = [
        Column("kind", 9, lambda row: row.kind, 0, right=False),
        Column("shape", 16, lambda row: shape_text(row, console), 5, right=False),
        Column("params", 6, lambda row: count(row.parameters), 1),
        Column("bytes", 9, lambda row: f"{row.bytes:,}", 4),
        Column("bits", 4, lambda row: f"{row.bits:.3g}", 0),
        Column("levels", 6, lambda row: str(len(row.levels) or ""), 3),
        Column("min", 7, lambda row: f"{row.min:.2g}", 6),
        Column("max", 7, lambda row: f"{row.max:.2g}", 6),
        Column("histogram", 10, lambda row: spark(row.histogram, 10, blocks), 0, right=False),
        _error_column("trained", "error\ntrained", 7, 0),
    ]
    if result.what == "run":
        columns.insert(-1, Column("distribution", 13, distribution_word, 2, right=False))
        columns += [_error_column(kind, label, 5, 1) for kind, label in LEVELS.items()]
    return columns


def _error_column(kind: str, header: str, width: int, priority: int) -> Column:
    def cell(row: TrainedRow) -> str:
        error = row.error[kind]
        return "" if error is None else percent(error)

    return Column(header, width, cell, priority)


def _closing_lines(result: TrainedResult) -> list[str]:
    lines = []
    if result.pictures:
        files = len(result.pictures)
        lines.append(f"pictures   {result.pictures[0]} shows them all ({files} files)")
    path = shlex.quote(str(result.path))
    lines.append(f"next       ddq report {path} --html report.html")
    if result.what == "run":
        lines.append(f"           ddq export {path}")
    return lines
