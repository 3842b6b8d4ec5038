"""Options shared by several commands, and the examples at the end of each help page."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout, also on failure.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no notes to stderr.")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load a pickled module; this can run code from the file."),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        envvar="DDQ_TRUST",
        help="Run code that only a file names, such as a run folder made elsewhere.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="Of a sweep, the run of this target: 3 (bits), 150kB, 12%.",
        show_default=False,
    ),
]


def examples(*lines: str) -> str:
    """Help epilog that shows one command per line, without rewrapping."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
