"""The result of `ddq inspect` as a table for the terminal: 80 columns show the gist, wider ones show everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddqcli.formatting import count, percent, shorten, size
from ddqcli.inspection.weights import ERROR_BITS, TOTAL_BITS, InspectResult

NAME_WIDTH = 22  # columns the names keep before further columns are shown
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
KINDS = {"depthwise": "dw conv", "embedding": "embed"}
STYLES = {"heavy-tailed": "yellow", "multi-peaked": "magenta", "flat": "cyan"}
LEVELS = {"uniform": "unif", "power_of_two": "pow2", "best": "best"}


@dataclass(frozen=True)
class Column:
    """A column of a table of layers."""

    header: str
    width: int
    cell: Callable[[Any], str | Text]
    urgency: int  # columns of low urgency wait for a wider terminal
    right: bool = True


def show(result: InspectResult, console: Console) -> None:
    """Print the layers, the sizes at each bit-width, where the pictures are, and what to type next."""
    columns = _columns(console)
    shown = fitting(
        columns, console.width, max((len(bare(row.name)) for row in result.layers), default=0)
    )
    console.print(f"{result.path}: {result.note}", soft_wrap=True, highlight=False, markup=False)
    if result.layers:
        console.print()
        console.print(layer_table(result.layers, shown, console))
        console.print()
        note = "Bits: squared error in % of the squares, by uniform, power-of-two and best (Lloyd-Max) levels."
        tails = (
            "Tail: reach of the outer 1 %; a Gaussian has 1."
            if any(c.header == "tail" for c in shown)
            else ""
        )
        more = (
            "A wider terminal shows more columns, --json all." if len(shown) < len(columns) else ""
        )
        console.print(Text(" ".join(filter(None, [note, tails, more])), style="dim"))
    console.print()
    console.print(_totals(result, console))
    console.print()
    for line in _closing(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def spark(histogram: tuple[int, ...], width: int, blocks: str = BLOCKS) -> str:
    """A histogram in `width` block characters; a blank holds no value at all, so single outliers stay visible."""
    counts = np.array([part.sum() for part in np.array_split(np.array(histogram), width)])
    return "".join(
        blocks[k] for k in np.ceil(counts / max(counts.max(), 1) * (len(blocks) - 1)).astype(int)
    )


def bare(name: str) -> str:
    return name.removesuffix(".weight")


def blocks_of(console: Console) -> str:
    """Block characters that the console can show."""
    return BLOCKS if _is_utf(console) else ASCII_BLOCKS


def _is_utf(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _columns(console: Console) -> list[Column]:
    blocks = blocks_of(console)
    columns = [
        Column("kind", 7, lambda row: KINDS.get(row.kind, row.kind), 0, right=False),
        Column("shape", 16, lambda row: "x".join(map(str, row.shape)), 6, right=False),
        Column("params", 6, lambda row: count(row.parameters), 0),
        Column("bytes", 8, lambda row: size(row.bytes), 7),
        Column("min", 7, lambda row: f"{row.min:.2g}", 5),
        Column("max", 7, lambda row: f"{row.max:.2g}", 5),
        Column("std", 7, lambda row: f"{row.std:.2g}", 5),
        Column("histogram", 10, lambda row: spark(row.histogram, 10, blocks), 0, right=False),
        Column("distribution", 13, shape_word, 0, right=False),
        Column("tail", 4, lambda row: f"{row.tail_weight:.{1 if row.tail_weight < 99 else 0}f}", 1),
    ]
    for bits, urgency in zip(ERROR_BITS, (2, 4, 0, 3), strict=True):
        for kind, label in LEVELS.items():
            error = lambda row, bits=bits, kind=kind: percent(row.error[bits][kind])  # noqa: E731 - one a column
            columns.append(Column(f"{bits} bit\n{label}", 5, error, urgency))
    return columns


def shape_word(row: Any) -> Text:
    """The distribution's shape, those that are hard to quantize in colour."""
    return Text(row.distribution, STYLES.get(row.distribution, ""))


def fitting(columns: list[Column], width: int, longest: int) -> list[Column]:
    """The columns that fit beside the names, the most urgent ones first."""
    shown: list[Column] = []
    for urgency in sorted({column.urgency for column in columns}):
        more = [column for column in columns if column.urgency <= urgency]
        if urgency and min(longest, NAME_WIDTH) + sum(column.width + 1 for column in more) > width:
            break
        shown = more
    return shown


def layer_table(rows: Sequence[Any], columns: list[Column], console: Console) -> Table:
    """One line a row, its name shortened to what the columns leave."""
    room = max(console.width - sum(column.width + 1 for column in columns), 8)
    dots = "…" if _is_utf(console) else "~"
    table = _table(console)
    table.add_column("layer", no_wrap=True)
    for column in columns:
        table.add_column(
            column.header,
            justify="right" if column.right else "left",
            min_width=column.width,
            no_wrap=True,
        )
    for row in rows:
        table.add_row(
            Text(shorten(bare(row.name), room, dots)), *(column.cell(row) for column in columns)
        )
    return table


def _totals(result: InspectResult, console: Console) -> Table:
    table = _table(console)
    table.add_column("all tensors", no_wrap=True)
    table.add_column("stored", justify="right", no_wrap=True)
    for bits in TOTAL_BITS:
        table.add_column(f"{bits} bits", justify="right", no_wrap=True)
    sizes = [result.bytes, *(result.bytes_at[bits] for bits in TOTAL_BITS)]
    table.add_row(f"{count(result.parameters)} parameters", *map(size, sizes))
    table.add_row("of stored", *(f"{100 * part / max(result.bytes, 1):.1f}%" for part in sizes))
    return table


def _table(console: Console) -> Table:
    """Without lines where the output is no terminal, so that other programs can read it."""
    if console.is_terminal and _is_utf(console):
        return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _closing(result: InspectResult) -> list[str]:
    rest = result.rest
    lines = []
    if rest["tensors"]:
        what = (
            f"{rest['tensors']} tensors, {count(rest['parameters'])} values, {size(rest['bytes'])}"
        )
        lines.append(
            f"Stays as stored, and is counted in every size: biases, norms and counters ({what})."
        )
    if result.tied:
        name, first = next(iter(result.tied.items()))
        more = f", and {len(result.tied) - 1} more" if len(result.tied) > 1 else ""
        lines.append(f"Counted once because they share memory: {name} with {first}{more}.")
    if result.pictures:
        lines.append(
            f"Pictures: {result.pictures[0]} shows them all ({len(result.pictures)} files)."
        )
    lines.append(f"Next: ddq finetune {result.path} --data FOLDER --target-bits 4")
    return lines
