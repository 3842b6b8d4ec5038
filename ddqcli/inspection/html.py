"""A self-contained HTML page of text, tables and pictures, for light, dark and small screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ddqcli.formatting import visible
from ddqcli.runs.files import write_atomic

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff;
  --card: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #1c2230; --line: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
p { max-width: 48rem; margin: .5rem 0; }
.table { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal;
  overflow-wrap: normal; }
.text { text-align: left; }
tr > :first-child { padding-left: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; padding: .5rem; max-width: 100%; overflow-x: auto; background: var(--card);
  border-radius: 6px; }
figure svg { display: block; height: auto; max-width: 100%; }
@media (max-width: 40rem) { figure svg.wide { max-width: none; } }
"""


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `text` columns are aligned left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, a table, and pictures as SVG elements."""

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[str] = ()


def write_html(
    path: Path, title: str, sections: Sequence[Section], inputs: Sequence[Path] = ()
) -> Path:
    """Write the page and return its path. Everything but the pictures is escaped.

    Raises UsageError or DDQError if it cannot be written, or would replace one of the `inputs`.
    """
    body = "\n".join(_section(section) for section in sections)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
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


def _text(text: str) -> str:
    """Return HTML that shows `text` in one line."""
    return escape(visible(text))


def _section(section: Section) -> str:
    parts = [
        f"<h2>{_text(section.title)}</h2>",
        *(f"<p>{_text(text)}</p>" for text in section.text if text),
    ]
    if section.table:
        parts.append(_table(section.table))
    if section.pictures:
        figures = "\n".join(f"<figure>{picture}</figure>" for picture in section.pictures)
        parts.append(f'<div class="pictures">\n{figures}\n</div>')
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        classes = [' class="text"' if k < table.text else "" for k in range(len(cells))]
        inner = "".join(
            f"<{tag}{css}>{_text(cell)}</{tag}>" for css, cell in zip(classes, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    head = f"<thead>{row(table.header, 'th')}</thead>"
    body = "\n".join(row(cells, "td") for cells in table.rows)
    return f'<div class="table"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'
