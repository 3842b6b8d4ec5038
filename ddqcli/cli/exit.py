"""How a command ends: its result on stdout or one message on stderr, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ddqcli.errors import DDQError, Interrupted, LimitExceeded

_WrongUse: Any = (
    typer.BadParameter.__base__
)  # of Typer's parser; where it is defined differs between versions


class CommandGroup(TyperGroup):
    """Turns whatever goes wrong, on the command line itself or later, into one message and its exit code."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        given = list(sys.argv[1:] if args is None else args)
        debug = (
            "--debug" in given
        )  # wherever it stands, so that it can be added to the end of what failed
        given = [arg for arg in given if arg != "--debug"]
        command = next((arg for arg in given if arg in self.commands), None)
        try:
            code = super().main(given, "ddq", **{**extra, "standalone_mode": False})
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as stop:
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, BrokenPipeError):
                raise
            code = 0  # the reader has seen enough
            _abandon_stdout()
        except (Exception, Interrupted) as error:
            if debug:
                traceback.print_exc()
            code = _answer(error, command, as_json="--json" in given)
        sys.exit(code if isinstance(code, int) else 0)


def run_command(
    command: str, work: Callable[[], Any], show: Callable[[Any], None], as_json: bool
) -> None:
    """Do the work and show its result."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        result = work()
    except KeyboardInterrupt:
        raise Interrupted("Interrupted", signal.SIGINT) from None
    unmet = list(getattr(result, "unmet", ()))
    try:
        if as_json:
            from ddqcli.render.console import envelope, plain

            plain(
                envelope(
                    command,
                    result.data(),
                    exit_code=LimitExceeded.exit_code if unmet else 0,
                    errors=unmet,
                )
            )
        else:
            show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; a gate is unmet all the same
        _abandon_stdout()
    if unmet:
        _say("\n".join(unmet))
        raise typer.Exit(LimitExceeded.exit_code)


def _stop(number: int, frame: object) -> None:
    raise Interrupted("Terminated", number)


def _answer(error: Exception | Interrupted, command: str | None, as_json: bool) -> int:
    """Say what went wrong, and give the exit code."""
    if isinstance(error, DDQError | Interrupted):
        message, code = str(error), error.exit_code
    elif isinstance(error, _WrongUse):
        message, code = error.format_message(), 2
        if not message.startswith("Usage:"):  # which is the help that `ddq` alone shows
            end = "" if message.endswith(("?", ".")) else "."
            message += f"{end} `ddq {command + ' ' if command else ''}--help` lists what there is."
    elif isinstance(error, OSError) and error.strerror:
        message, code = f"{error.filename or 'Standard output'}: {error.strerror}.", 1
        if error.filename is None:
            _abandon_stdout()
    else:
        said = " ".join(str(error).split())[:300]
        message = f"{type(error).__name__}{': ' + said if said else ''}; `ddq --debug ...` shows where it comes from."
        code = 1
    if as_json:
        from ddqcli.render.console import envelope, plain

        try:
            plain(envelope(command, exit_code=code, errors=[message]))
            sys.stdout.flush()
        except OSError:
            _abandon_stdout()
    _say(message)
    return code


def _say(message: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"{message}\n" if message.startswith("Usage:") else f"Error: {message}\n")


def _abandon_stdout() -> None:
    """Let what is still to be written, which Python tries at exit, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
