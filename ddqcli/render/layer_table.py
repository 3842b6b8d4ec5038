"""A table of layers for the terminal: 80 columns show the gist, wider ones show everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddqcli.formatting import shorten

MIN_NAME_WIDTH = 22  # width of the names before further columns are shown
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
STYLES = {"heavy-tailed": "yellow", "multi-peaked": "magenta", "flat": "cyan"}
LEVELS = {"uniform": "unif", "power_of_two": "pow2", "best": "best"}
MORE_COLUMNS = "A wider terminal shows more columns, --json all."


@dataclass(frozen=True)
class Column:
    """A column of a table of layers."""

    header: str
    width: int  # at least; a longer text of a row widens it
    cell: Callable[[Any], str | Text]  # of a row
    priority: int  # 0: always shown; the higher, the wider a terminal it takes
    right: bool = True


def fitting_columns(
    columns: Sequence[Column], rows: Sequence[Any], width: int, names: Sequence[str]
) -> Sequence[Column]:
    """Return the columns that fit beside the names into `width`, by priority, as wide as needed.

    `names` is all that the first column holds.
    """
    name_width = min(max(map(len, names), default=0), MIN_NAME_WIDTH)
    columns = [replace(column, width=_needed_width(column, rows)) for column in columns]
    shown: Sequence[Column] = []
    for priority in sorted({column.priority for column in columns}):
        candidates = [column for column in columns if column.priority <= priority]
        if priority and name_width + _width(candidates) > width:
            break
        shown = candidates
    return shown


def bar(share: float, width: int) -> str:
    """Return a bar, of `width` characters for a share of 1, in halves of a character."""
    halves = round(2 * width * min(max(share, 0.0), 1.0))
    return "━" * (halves // 2) + "╸" * (halves % 2)


def shows_bars(console: Console) -> bool:
    """True on a terminal that can show lines and bars; a pipe gets plain columns."""
    return console.is_terminal and _is_utf(console)


def layer_table(
    rows: Sequence[Any],
    columns: Sequence[Column],
    console: Console,
    name_of: Callable[[str], str] = str,
) -> Table:
    """Return a table with a line for each row, its name shortened to the width left.

    `name_of` is how a name is shown.
    """
    name_width = max(console.width - _width(columns), 8)
    ellipsis = "…" if _is_utf(console) else "~"
    table = plain_table(console)
    table.add_column("layer", no_wrap=True)
    for column in columns:
        table.add_column(
            Text(column.header),
            justify="right" if column.right else "left",
            min_width=column.width,
            no_wrap=True,
        )
    for row in rows:
        name = Text(shorten(name_of(row.name), name_width, ellipsis))
        table.add_row(name, *(column.cell(row) for column in columns))
    return table


def plain_table(console: Console) -> Table:
    """Return an empty table, without lines if the output is no terminal, for other programs."""
    if shows_bars(console):
        return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))


def spark(histogram: Sequence[int], width: int, blocks: str = BLOCKS) -> str:
    """Return a histogram as `width` block characters; a blank holds no value at all."""
    counts = np.array([part.sum() for part in np.array_split(np.array(histogram), width)])
    heights = np.ceil(counts / max(counts.max(), 1) * (len(blocks) - 1)).astype(int)
    return "".join(blocks[height] for height in heights)


def bare_name(name: str) -> str:
    """Return the name of the layer of a weight."""
    return name.removesuffix(".weight")


def distribution_word(row: Any) -> Text:
    """Return the distribution's shape; shapes that are hard to quantize have a color."""
    return Text(row.distribution, STYLES.get(row.distribution, ""))


def shape_text(row: Any, console: Console) -> str:
    """Return a shape as text: 64×32×1×1; 1 for a scalar."""
    return ("×" if _is_utf(console) else "x").join(map(str, row.shape)) or "1"


def blocks_of(console: Console) -> str:
    """Return block characters that the console can show."""
    return BLOCKS if _is_utf(console) else ASCII_BLOCKS


def _needed_width(column: Column, rows: Sequence[Any]) -> int:
    return max([column.width, *(cell_len(str(column.cell(row))) for row in rows)])


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width + 1 for column in columns)


def _is_utf(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
