"""`ddq runs`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddqcli.cli.options import Json, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.commands.runs import RunsResult

EXAMPLES = examples("ddq runs", "ddq runs runs --json")


def runs(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="Folder with runs.  [default: runs/, and what --run-dir put elsewhere]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs, the newest first.

    Prints each run's state, target, bytes and metric, and how to go on with an unfinished one.
    """

    def work() -> RunsResult:
        from ddqcli.commands.runs import list_runs

        return list_runs(folder)

    run_command("runs", work, _show, as_json)


def _show(result: RunsResult) -> None:
    from ddqcli.render import console, runs

    runs.show(result, console.out)
