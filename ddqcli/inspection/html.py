"""A self-contained HTML page of text, tables and pictures, for light, dark and small screens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ddqcli.errors import UsageError
from ddqcli.formatting import visible
from ddqcli.runs.files import write_atomic

_GENERATOR = '<meta name="generator" content="ddq">'
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff;
  --card: #f6f8fa; --line: #d1d9e0; --bar: #0072b2; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #1c2230; --line: #3d444d;
    --bar: #56b4e9; --warn: #3b2e08; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
p { max-width: 60rem; margin: .5rem 0; }
.warning { padding: .5rem .75rem; background: var(--warn); border-radius: 6px; max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
  gap: 1rem; margin: 1rem 0; }
.facts div { padding: .75rem 1rem; background: var(--card); border-radius: 6px; }
.facts dt, .facts dd { margin: 0; color: var(--soft); font-size: .85rem; }
.facts .value { color: var(--ink); font-size: 1.25rem; font-weight: 600; line-height: 1.3; }
.table { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: 6px; }
.narrow { width: fit-content; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .35rem; text-align: right; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal;
  overflow-wrap: normal; }
.text { text-align: left; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; }
.name { width: 22rem; min-width: min(12rem, 45vw); }
.long { min-width: 16rem; white-space: normal; }
.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent 0)
  left bottom / 100% 3px no-repeat; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  grid-auto-flow: dense; gap: 1rem; }
.beside { display: grid; align-items: start; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.beside .table { margin: 0; }
figure { margin: 0; padding: .5rem; min-width: 0; overflow-x: auto; background: var(--card);
  border-radius: 6px; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { padding: .25rem .5rem; color: var(--soft); font-size: .85rem; }
.wide { grid-column: 1 / -1; }
.wide svg { min-width: 60rem; }
"""

_LONG_NAME, _LONG = 16, 40  # characters from which the first cell, another one may be wrapped
_NARROW = 4  # columns of a table that is not as wide as the page


@dataclass(frozen=True)
class Fact:
    """A figure that matters, in large letters: its name, its value, and a note below it."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `text` columns are aligned left, the others right.

    `bars` maps a column to a share (0 to 1) for each row, drawn below its number.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    bars: Mapping[int, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An SVG element, with a caption that says what its lines and colors mean.

    A wide one takes a row of its own, a tall one the place of several rows.
    """

    svg: str
    caption: str = ""
    wide: bool = False
    rows: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, if any, then figures that matter, paragraphs, warnings, a table and pictures.

    A table and pictures of one section stand side by side where there is room.
    """

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    facts: Sequence[Fact] = ()
    warnings: Sequence[str] = ()


def write_html(
    path: Path, title: str, sections: Sequence[Section], inputs: Sequence[Path] = ()
) -> Path:
    """Write the page and return its path. Everything but the pictures is escaped.

    Raises UsageError or DDQError if it cannot be written, or would replace one of the `inputs` or
    anything but a page of ddq's or an empty file.
    """
    if path.is_file() and path.stat().st_size and not is_own_page(path):
        raise UsageError(
            f"{path} cannot be written: the file there is no page of ddq's; remove it, or name "
            "another file."
        )
    body = "\n".join(_section(section) for section in sections)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{_GENERATOR}
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{body}
</body>
</html>
"""
    write_atomic(path, lambda temporary: temporary.write_bytes(page.encode()), inputs=inputs)
    return path


def is_own_page(path: Path) -> bool:
    """True for a page that `write_html` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(1000)


def _text(text: str) -> str:
    """Return HTML that shows `text` in one line."""
    return escape(visible(text))


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"] if section.title else []
    if section.facts:
        parts.append(_facts(section.facts))
    parts += [f"<p>{_text(text)}</p>" for text in section.text if text]
    parts += [f'<p class="warning">Warning: {_text(text)}.</p>' for text in section.warnings]
    content = [_table(section.table, section.title)] if section.table else []
    if section.pictures:
        figures = "\n".join(map(_figure, section.pictures))
        content.append(f'<div class="pictures">\n{figures}\n</div>')
    if len(content) == 2:
        content = ['<div class="beside">', *content, "</div>"]
    parts += content
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _facts(facts: Sequence[Fact]) -> str:
    cards = "\n".join(
        f'<div><dt>{_text(fact.name)}</dt><dd class="value">{_text(fact.value)}</dd>'
        f"<dd>{_text(fact.note)}</dd></div>"
        for fact in facts
    )
    return f'<dl class="facts">\n{cards}\n</dl>'


def _figure(picture: Picture) -> str:
    attribute = f' style="grid-row: span {picture.rows}"' if picture.rows > 1 else ""
    if picture.wide:
        attribute = ' class="wide"'
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure{attribute}>{picture.svg}{caption}</figure>"


def _table(table: Table, title: str) -> str:
    """Return the table in a box that scrolls, also by keyboard, if the window is narrower."""

    def row(cells: Sequence[str], tag: str, number: int | None = None) -> str:
        inner = []
        for column, text in enumerate(cells):
            attributes = ' class="text"' if column < table.text else ""
            if column == 0 and len(text) > _LONG_NAME:
                attributes = ' class="text name"'
            elif len(text) > _LONG:
                attributes = ' class="text long"'
            if number is not None and column in table.bars:
                share = 100 * table.bars[column][number]
                attributes = f' class="bar" style="--share: {share:.1f}%"'
            inner.append(f"<{tag}{attributes}>{_text(text)}</{tag}>")
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(row(cells, "td", number) for number, cells in enumerate(table.rows))
    css = "table narrow" if len(table.header) <= _NARROW else "table"
    return (
        f'<div class="{css}" role="region" aria-label="{_text(title)}" tabindex="0"><table>\n'
        f"<thead>{row(table.header, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
