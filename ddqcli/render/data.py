"""CSV and Markdown: the one place where text becomes a harmless cell or line of each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from ddqcli.formatting import visible

# What begins or ends something in GitHub's Markdown: an underscore only outside of words, and of
# brackets only those of a link.
_MARKDOWN = re.compile(r"[\\`*<|~$&]|(?<=\])[(\[]|(?<![^\W_])_|_(?![^\W_])")
_FORMULA = ("=", "+", "-", "@")  # a spreadsheet would compute a cell that begins like this


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV without the last newline. Texts like formulas get a leading quote."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue().rstrip("\n")


def markdown(text: str) -> str:
    """Return the Markdown that shows `text` in one line."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1
) -> list[str]:
    """Return the lines of a table. The first `text` columns are aligned left, the others right."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    cells = [[markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, rule, *cells]]


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = visible(value)
    return f"'{value}" if value.startswith(_FORMULA) else value
