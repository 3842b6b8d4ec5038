"""The result of `ddq inspect` for a run or an exported file as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ddqcli.formatting import count, percent, size
from ddqcli.inspection.trained import ERROR, FIXED, TrainedResult, TrainedRow
from ddqcli.render.inspect import (
    KINDS,
    LEVELS,
    Column,
    bare,
    blocks_of,
    fitting,
    layer_table,
    shape_word,
    spark,
)
from ddqcli.render.report import totals


def show(result: TrainedResult, console: Console) -> None:
    """Print the layers, the totals, where the pictures are, and what to type next."""
    columns = _columns(result, console)
    shown = fitting(columns, console.width, max(len(bare(row.name)) for row in result.layers))
    console.print(f"{result.path}: {result.note}", soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(layer_table(result.layers, shown, console))
    console.print()
    notes = [
        f"Histogram: {result.histogram_of}.",
        ERROR,
        *([FIXED] if result.what == "run" else []),
    ]
    more = "A wider terminal shows more columns, --json all." if len(shown) < len(columns) else ""
    console.print(Text(" ".join(filter(None, [*notes, more])), style="dim"))
    console.print()
    for line in [*totals(result.report), *_closing(result)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _columns(result: TrainedResult, console: Console) -> list[Column]:
    blocks = blocks_of(console)
    columns = [
        Column("kind", 7, lambda row: KINDS.get(row.kind, row.kind), 0, right=False),
        Column("shape", 16, lambda row: "x".join(map(str, row.shape)), 5, right=False),
        Column("params", 6, lambda row: count(row.parameters), 1),
        Column("bytes", 8, lambda row: size(row.bytes), 4),
        Column("bits", 4, lambda row: f"{row.bits:.3g}", 0),
        Column("levels", 6, lambda row: str(len(row.levels) or ""), 3),
        Column("min", 7, lambda row: f"{row.min:.2g}", 6),
        Column("max", 7, lambda row: f"{row.max:.2g}", 6),
        Column("histogram", 10, lambda row: spark(row.histogram, 10, blocks), 0, right=False),
        Column("error\ntrained", 7, lambda row: _error(row, "trained"), 0),
    ]
    if result.what == "run":
        columns.insert(-1, Column("distribution", 13, shape_word, 2, right=False))
        columns += [
            Column(label, 5, lambda row, kind=kind: _error(row, kind), 1)
            for kind, label in LEVELS.items()
        ]
    return columns


def _error(row: TrainedRow, kind: str) -> str:
    value = row.error[kind]
    return "" if value is None else percent(value)


def _closing(result: TrainedResult) -> list[str]:
    lines = []
    if result.pictures:
        lines.append(
            f"pictures   {result.pictures[0]} shows them all ({len(result.pictures)} files)"
        )
    page = f"ddq report {result.path} --html report.html"
    lines.append(
        f"next       {page}" + (f"   ddq export {result.path}" if result.what == "run" else "")
    )
    return lines
