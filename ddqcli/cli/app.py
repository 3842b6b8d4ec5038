"""The `ddq` application: its commands, its global options, and the entry point.

No module of `cli` imports anything heavy at the top: `ddq --help` loads neither torch nor numpy.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ddqcli import __version__
from ddqcli.cli import export, finetune, init, inspect, report, runs
from ddqcli.cli.error_handling import ErrorHandlingGroup
from ddqcli.cli.run_command import interrupt_again

EXIT_CODES = """\b
Exit codes:
  0    success
  1    failure
  2    wrong usage
  3    limit exceeded
  4    verification mismatch
  130  Ctrl-C
  143  SIGTERM"""

app = typer.Typer(
    name="ddq",
    cls=ErrorHandlingGroup,
    help="Finetune a trained PyTorch model under a memory budget with Differentiable Dynamic "
    "Quantization (DDQ).",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would double the time of `--help`
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"ddq {__version__}\n")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; allowed after any command."),
    ] = False,
) -> None:
    """Declare the global options; ErrorHandlingGroup reads `--debug`."""


app.command(epilog=init.EXAMPLES)(init.init)
app.command(epilog=finetune.EXAMPLES)(finetune.finetune)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=runs.EXAMPLES)(runs.runs)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)


def main() -> None:
    """Entry point of `ddq` and of `python -m ddqcli`."""
    # A file must not get the number of a stream that the caller closed: warnings would go into it.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    # Python sets such a stream to None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # it may know ASCII alone
    sys.unraisablehook = interrupt_again
    app()
