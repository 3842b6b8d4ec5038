"""The result of `ddq inspect` for a checkpoint as a table for the terminal."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddqcli.formatting import count, percent
from ddqcli.inspection.checkpoint_rows import ERROR_BITS, TOTAL_BITS, CheckpointResult
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
    plain_table,
    shape_text,
    spark,
)

ERROR_NOTE = (
    "Bits: squared error in % of the squares, with uniform, power-of-two and best (Lloyd-Max) "
    "levels."
)
TAIL_NOTE = "Tail: range of the central 99 %; a Gaussian has 1."


def show(result: CheckpointResult, console: Console) -> None:
    """Print the layers, the sizes at each bit-width, the pictures, and what to type next."""
    console.print(f"{result.path}: {result.note}", soft_wrap=True, highlight=False, markup=False)
    if result.layers:
        all_columns = _columns(console)
        names = [bare_name(row.name) for row in result.layers]
        columns = fitting_columns(all_columns, result.layers, console.width, names)
        console.print()
        console.print(layer_table(result.layers, columns, console, bare_name))
        console.print()
        notes = [ERROR_NOTE]
        if any(column.header == "tail" for column in columns):
            notes.append(TAIL_NOTE)
        if len(columns) < len(all_columns):
            notes.append(MORE_COLUMNS)
        console.print(Text(" ".join(notes), style="dim"))
    console.print()
    console.print(_totals(result, console))
    console.print()
    print_lines(_closing_lines(result), console)


def _columns(console: Console) -> list[Column]:
    blocks = blocks_of(console)
    columns = [
        Column("kind", 9, lambda row: row.kind, 0, right=False),
        Column("shape", 16, lambda row: shape_text(row, console), 6, right=False),
        Column("params", 6, lambda row: count(row.parameters), 0),
        Column("bytes", 11, lambda row: f"{row.bytes:,}", 7),
        Column("min", 7, lambda row: f"{row.min:.2g}", 5),
        Column("max", 7, lambda row: f"{row.max:.2g}", 5),
        Column("std", 7, lambda row: f"{row.std:.2g}", 5),
        Column("histogram", 10, lambda row: spark(row.histogram, 10, blocks), 0, right=False),
        Column("distribution", 13, distribution_word, 0, right=False),
        Column("tail", 4, lambda row: f"{row.tail_weight:.{1 if row.tail_weight < 99 else 0}f}", 1),
    ]
    for bits, priority in zip(ERROR_BITS, (2, 4, 0, 3), strict=True):
        for kind, label in LEVELS.items():
            columns.append(_error_column(bits, kind, f"{bits} bit\n{label}", priority))
    return columns


def _error_column(bits: int, kind: str, header: str, priority: int) -> Column:
    return Column(header, 5, lambda row: percent(row.error[bits][kind]), priority)


def _totals(result: CheckpointResult, console: Console) -> Table:
    table = plain_table(console)
    table.add_column("bytes of all tensors", no_wrap=True)
    table.add_column("stored", justify="right", no_wrap=True)
    for bits in TOTAL_BITS:
        table.add_column(f"{bits} bits", justify="right", no_wrap=True)
    sizes = [result.bytes, *(result.bytes_at[bits] for bits in TOTAL_BITS)]
    table.add_row(f"{count(result.parameters)} parameters", *(f"{part:,}" for part in sizes))
    table.add_row("of stored", *(f"{100 * part / max(result.bytes, 1):.1f}%" for part in sizes))
    return table


def _closing_lines(result: CheckpointResult) -> list[str]:
    rest = result.rest
    lines = []
    if rest["tensors"]:
        values = f"{count(rest['parameters'])} values, {rest['bytes']:,} bytes"
        lines.append(
            f"the rest   {rest['tensors']} biases, norms and counters ({values}) stay as stored; "
            "every size counts them"
        )
    if result.tied:
        name, first = next(iter(result.tied.items()))
        more = f", and {len(result.tied) - 1} more" if len(result.tied) > 1 else ""
        lines.append(f"shared     {name} is the same memory as {first}{more}; counted once")
    if result.pictures:
        files = len(result.pictures)
        lines.append(f"pictures   {result.pictures[0]} shows them all ({files} files)")
    path = shlex.quote(str(result.path))
    # Recognizing a network takes torch, which this command does without.
    lines.append("arch       net.py:build builds your network; one of torchvision needs no --arch")
    lines.append(
        f"next       ddq finetune {path} --arch net.py:build --data FOLDER --target-bits 4"
    )
    return lines
