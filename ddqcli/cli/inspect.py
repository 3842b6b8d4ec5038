"""`ddq inspect`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddqcli.cli.options import AllowPickle, Json, Quiet, Target, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.inspection.checkpoint_rows import CheckpointResult
    from ddqcli.inspection.trained_rows import TrainedResult

EXAMPLES = examples(
    "ddq inspect model.pt",
    "ddq inspect model.pt -o pictures",
    "ddq inspect runs/20260131-142310-model",
)


def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint, run folder, sweep or exported file.",
            show_default=False,
        ),
    ],
    target: Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Output folder for the figures.  [default: inspect/<model>]",
            show_default=False,
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's weight distributions.

    For a checkpoint: each layer's histogram and its quantization error at 2, 3, 4 and 8 bits. For
    a run or an exported file: the learned levels and bit-widths. Prints a table; writes PNG and SVG
    figures and an HTML page.
    """

    def work() -> CheckpointResult | TrainedResult:
        from ddqcli.commands.inspect import inspect as command
        from ddqcli.render.progress import ProgressReporter
        from ddqcli.runs.find import find_finished

        path = find_finished(model, target) if model.is_dir() or target is not None else model
        with ProgressReporter(quiet=quiet) as reporter:
            return command(
                path,
                out=out or Path("inspect") / path.resolve().stem,
                pickle=allow_pickle,
                on_progress=lambda done, total, name: reporter.progress(
                    f"inspect {name}", done, total
                ),
            )

    run_command("inspect", work, _show, as_json)


def _show(result: CheckpointResult | TrainedResult) -> None:
    from ddqcli.inspection.checkpoint_rows import CheckpointResult
    from ddqcli.render import console, inspect_checkpoint, inspect_trained

    if isinstance(result, CheckpointResult):
        inspect_checkpoint.show(result, console.out)
    else:
        inspect_trained.show(result, console.out)
