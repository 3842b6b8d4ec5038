"""A sweep as a table: size against accuracy, a row for each target."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ddqcli.commands.sweep import PICTURE, SweepResult
from ddqcli.formatting import duration
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.report import SweepTable

_TEXT_COLUMNS = ("target", "run")


def show(result: SweepResult, console: Console) -> None:
    """Print the table, the warnings, the folder, and what to type next."""
    console.print(_table(result.table))
    console.print()
    for row in result.table.targets:
        for warning in row.warnings:
            console.print(f"warning    {row.target}: {warning}", markup=False, soft_wrap=True)
    if result.run_dir is None:
        console.print("dry run    all budgets can be met; nothing was trained", soft_wrap=True)
        return
    for line in (
        f"time       {duration(result.seconds)}",
        f"runs       {result.run_dir}",
        f"picture    {result.run_dir}/{PICTURE}.png",
        f"next       ddq report {result.run_dir}/{result.table.targets[-1].run}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _table(sweep: SweepTable) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    metric = sweep.metric
    for column in ("target", "bytes", "bits a weight", metric.name, "drop", "run"):
        table.add_column(
            column, justify="left" if column in _TEXT_COLUMNS else "right", no_wrap=True
        )
    table.add_row(
        "float", f"{sweep.float.bytes:,}", "", _text(metric, sweep.float.accuracy), "", ""
    )
    for row in sweep.targets:
        table.add_row(
            row.target,
            f"{row.bytes:,}",
            f"{row.average_bits:.3f}",
            _text(metric, row.accuracy),
            "" if row.drop is None else metric.text(row.drop).rstrip("%"),
            row.run or "",
        )
    return table


def _text(metric: Metric, value: float | None) -> str:
    return "" if value is None else metric.text(value)
