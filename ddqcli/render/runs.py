"""The runs of a folder as a table, and the commands that go on with unfinished ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from ddqcli.commands.runs import RunRow, RunsResult
from ddqcli.formatting import shorten
from ddqcli.render.console import print_lines
from ddqcli.runs.names import RUNS

_MIN_NAME_WIDTH = 20


def show(result: RunsResult, console: Console) -> None:
    """Print a row for each run, those of a sweep below it, then what to type next."""
    if not result.runs:
        where = result.folder or f"{RUNS}/"
        console.print(f"no runs in {where}; `ddq finetune MODEL` makes one", soft_wrap=True)
        return
    rows: list[tuple[str, ...]] = [
        (_name(row, depth), *_cells(row, result)) for row, depth in _flat(result.runs)
    ]
    header: tuple[str, ...] = (
        "run",
        "state",
        "target",
        "bytes",
        _only_metric(result) or "metric",
        "warnings",
    )
    if not any(row.warnings for row, _ in _flat(result.runs)):
        header, rows = header[:-1], [row[:-1] for row in rows]
    rest = sum(2 + max(len(row[k]) for row in (header, *rows)) for k in range(1, len(header)))
    width = max(console.width - rest, _MIN_NAME_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(header):
        table.add_column(name, justify="right" if k > 2 else "left", no_wrap=True)
    for name, *cells in rows:
        table.add_row(shorten(name, width), *cells)
    console.print(table)
    commands = [row.resume for row in result.runs if row.resume]
    if commands:
        console.print()
    print_lines([f"go on      {command}" for command in commands], console)


def _flat(rows: Iterable[RunRow], depth: int = 0) -> Iterator[tuple[RunRow, int]]:
    """Yield each run with its depth: 1 inside a sweep."""
    for row in rows:
        yield row, depth
        yield from _flat(row.runs, depth + 1)


def _name(row: RunRow, depth: int) -> str:
    return f"  {row.path.name}" if depth else str(row.path)


def _cells(row: RunRow, result: RunsResult) -> tuple[str, ...]:
    """Return state, target, bytes, metric and the number of warnings."""
    is_sweep = len(row.targets) > 1
    state = str(row.state)
    if row.state in ("unfinished", "running") and row.done is not None:
        state += f" {100 * row.done:.0f}%"
    metric, accuracy = row.metric, row.accuracy
    value = metric.text(accuracy.quantized) if metric and accuracy else ""
    if value and metric and not _only_metric(result):
        value = f"{metric.name} {value}"
    return (
        f"sweep, {state}" if is_sweep else state,
        f"{len(row.targets)} targets" if is_sweep else "".join(row.targets),
        "" if row.bytes is None else f"{row.bytes:,}",
        value,
        str(len(row.warnings) or ""),
    )


def _only_metric(result: RunsResult) -> str | None:
    """Return the name of the metric, if all runs are judged by the same."""
    names = {row.metric.name for row, _ in _flat(result.runs) if row.metric}
    return names.pop() if len(names) == 1 else None
