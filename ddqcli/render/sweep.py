"""A sweep: size against accuracy, as a table with a row for each target, and as a curve."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ddqcli.formatting import duration
from ddqcli.render.console import export_command, print_lines, sizes_lines
from ddqcli.render.curve import curve_lines
from ddqcli.render.data import csv_text, markdown_table
from ddqcli.render.layer_table import bar, shows_bars
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.names import SWEEP_PICTURE
from ddqcli.runs.report import SweepTable

if TYPE_CHECKING:
    from ddqcli.commands.sweep import SweepResult

CSV_COLUMNS = ("target", "bytes", "budget_bytes", "average_bits", "accuracy", "drop", "run")
_TEXT_COLUMNS = ("target", "run")
_BAR_WIDTH = 8  # characters


def show_result(result: SweepResult, console: Console) -> None:
    """Print table, curve and warnings of a sweep just made, the folder, and what to type next."""
    show(result.table, console)
    if result.run_dir is None:
        console.print(
            "dry run    all budgets can be met, and model and data fit; nothing was trained",
            soft_wrap=True,
        )
        return
    for line in (
        f"time       {duration(result.seconds)}",
        f"runs       {result.run_dir}",
        f"picture    {result.run_dir}/{SWEEP_PICTURE}.png",
        *sizes_lines(result.file_format),
        *next_lines(result.run_dir, result.table, result.file_format),
    ):
        console.print(line, markup=False, soft_wrap=True)


def next_lines(folder: Path, sweep: SweepTable, file_format: str) -> list[str]:
    """Return the commands that go on with one run of a sweep."""
    run = f"{shlex.quote(str(folder))} --target {_short(sweep.targets[-1].target)}"
    return [f"next       ddq report {run}", f"           {export_command(run, file_format)}"]


def show(sweep: SweepTable, console: Console) -> None:
    """Print a row for each target, the curve, and the warnings.

    On a terminal, bars show the bytes, of the float model's, if they fit.
    """
    header, rows = _header(sweep), _rows(sweep)
    width = sum(2 + max(map(len, texts)) for texts in zip(header, *rows, strict=True))
    bars = shows_bars(console) and width + _BAR_WIDTH <= console.width
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in header:
        table.add_column(
            column, justify="left" if column in _TEXT_COLUMNS else "right", no_wrap=True
        )
        if bars and column == "bytes":
            table.add_column("", style="green", width=_BAR_WIDTH)
    sizes = [sweep.float.bytes, *(row.bytes for row in sweep.targets)]
    for size, row in zip(sizes, rows, strict=True):
        if bars:
            row.insert(2, bar(size / max(sizes), _BAR_WIDTH))
        table.add_row(*row)
    console.print(table)
    console.print()
    if lines := _curve(sweep):
        for line in lines:
            console.print(line, soft_wrap=True)
        console.print()
    warnings = [(row.target, warning) for row in sweep.targets for warning in row.warnings]
    print_lines([f"warning    {target}: {warning}" for target, warning in warnings], console)


def as_csv(sweep: SweepTable) -> str:
    """Return the targets as CSV, numbers unformatted."""
    rows = [row.data() for row in sweep.targets]
    return csv_text(CSV_COLUMNS, [[row[column] for column in CSV_COLUMNS] for row in rows])


def as_markdown(sweep: SweepTable) -> str:
    """Return the table as Markdown, for the summary of a CI job."""
    return "\n".join(["### ddq report", "", *markdown_table(_header(sweep), _rows(sweep))])


def _header(sweep: SweepTable) -> list[str]:
    return ["target", "bytes", "ratio", "bits a weight", sweep.metric.name, "drop", "run"]


def _rows(sweep: SweepTable) -> list[list[str]]:
    """Return the texts of the float model and of each target."""
    metric, stored = sweep.metric, sweep.float
    first = ["float", f"{stored.bytes:,}", "", "", _text(metric, stored.accuracy), "", ""]
    return [first] + [
        [
            row.target,
            f"{row.bytes:,}",
            f"{stored.bytes / max(1, row.bytes):.1f}x",
            f"{row.average_bits:.3f}",
            _text(metric, row.accuracy),
            "" if row.drop is None else metric.text(row.drop).rstrip("%"),
            row.run or "",
        ]
        for row in sweep.targets
    ]


def _curve(sweep: SweepTable) -> list[str]:
    """Return a picture of the metric over the size of the file; nothing after a dry run."""
    points = [
        (row.bytes, row.accuracy, row.target) for row in sweep.targets if row.accuracy is not None
    ]
    if not points or sweep.float.accuracy is None:
        return []
    metric, stored = sweep.metric, sweep.float.accuracy
    values, sizes = [stored, *(y for _, y, _ in points)], [x for x, _, _ in points]
    ticks = [metric.text(max(values)), metric.text(min(values))]
    ticks += [f"{min(sizes):,} bytes", f"{max(sizes):,}"]
    title = f"{metric.name} over size of the file (log); dashed: float"
    return [title, *curve_lines(points, stored, ticks)]


def _short(target: str) -> str:
    return shlex.quote(target.removesuffix(" bits"))


def _text(metric: Metric, value: float | None) -> str:
    return "" if value is None else metric.text(value)
