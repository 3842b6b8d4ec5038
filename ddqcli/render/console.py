"""The two consoles, and the JSON envelope: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

ENVELOPE_VERSION = 1

_PIPE_WIDTH = 160  # where nobody tells a width: no name is cut short


class _Result(Console):
    """Stdout: who reads no further is for the command line to answer."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Notes(Console):
    """Stderr: work goes on though nobody reads of it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


out = _Result(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = _Notes(stderr=True, highlight=False, emoji=False)


def envelope(
    command: str, data: Any = None, *, exit_code: int = 0, errors: list[str] | None = None
) -> str:
    """The one JSON object that `--json` prints, on success and on failure."""
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


def plain(text: str) -> None:
    """Text on stdout as it is: no wrapping, no colour, no markup."""
    sys.stdout.write(text + "\n")
