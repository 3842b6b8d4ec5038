"""Consoles and the JSON envelope: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddqcli.formatting import visible

ENVELOPE_VERSION = 1

_LABEL_WIDTH = 11  # of `size       76,640 -> ...`
_PIPE_WIDTH = 160  # columns if stdout is not a terminal, so that layer names stay whole


class _PlainConsole(Console):
    """Console that shows any string as one line of plain text: no markup, emoji or control codes.

    What needs several lines or a color is a `rich.text.Text`.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, emoji=False, markup=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **(options | {"markup": False, "emoji": False}))


class _ResultConsole(_PlainConsole):
    """Console for stdout that raises BrokenPipeError, which the command line handles."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _NotesConsole(_PlainConsole):
    """Console for stderr that goes quiet when its reader leaves; the work continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


out = _ResultConsole(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = _NotesConsole(stderr=True)


def json_envelope(
    command: str | None,
    data: Any = None,
    *,
    exit_code: int = 0,
    errors: list[str] | None = None,
) -> str:
    """Return the JSON object that `--json` prints, on success and on failure.

    `command` is None if the error lies before the command's name.
    """
    return json.dumps(
        {
            "version": ENVELOPE_VERSION,
            "command": command,
            "status": "ok" if exit_code == 0 else "error",
            "exit_code": exit_code,
            "data": data,
            "errors": errors or [],
        },
        indent=2,
    )


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines of a label and a text.

    On a terminal labels are bold, warnings have a color, and a long text is wrapped beside its
    label; other programs get each line whole.
    """
    if not console.is_terminal:
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=_LABEL_WIDTH, style="bold", no_wrap=True)
    grid.add_column()
    for line in map(visible, lines):
        label, text = line[:_LABEL_WIDTH], line[_LABEL_WIDTH:]
        grid.add_row(Text(label), Text(text), style="yellow" if "warning" in label else None)
    console.print(grid)


def print_plain(text: str) -> None:
    """Print text to stdout unchanged: no wrapping, color or markup."""
    sys.stdout.write(text + "\n")


def export_command(run: str, file_format: str) -> str:
    """Return the command that writes the file of `run`, its words as a shell reads them."""
    flag = "" if file_format == "safetensors" else f" --format {file_format}"
    return f"ddq export {run}{flag}"


def sizes_lines(file_format: str) -> list[str]:
    """Say of which file the sizes of a report are, if the run's target is for another one."""
    if file_format == "safetensors":
        return []
    return [
        f"sizes      of the safetensors file; the target is for the {file_format} file, whose size "
        f"`ddq export --format {file_format}` checks and prints"
    ]
