"""Run one command and print its result: text, or one JSON envelope with `--json`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import typer

from ddqcli.cli.error_handling import discard_stdout, print_error
from ddqcli.cli.interruption import watch_sigterm
from ddqcli.errors import Interrupted, LimitExceeded, UsageError

_SOON = 0.02  # seconds; a callback has returned by then


class Result(Protocol):
    """Result of a command: `data()` goes into the envelope; `unmet`, if any, lists limits."""

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-serializable values."""


R = TypeVar("R", bound=Result)


def run_command(
    command: str, work: Callable[[], R], show: Callable[[R], None], as_json: bool
) -> None:
    """Call `work` and print its result with `show`, or as JSON.

    Raises Interrupted on Ctrl-C and SIGTERM, and exits with LimitExceeded's code if the result
    exceeds a limit; the result is printed first.
    """
    watch_sigterm()
    try:
        _require_working_folder()
        result = work()
    except KeyboardInterrupt:
        raise Interrupted("Interrupted", signal.SIGINT) from None
    exceeded = list(getattr(result, "unmet", ()))
    try:
        if as_json:
            _print_json(command, result, exceeded)
        else:
            show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left; an exceeded limit still fails the command
        discard_stdout()
    if exceeded:
        print_error("\n".join(exceeded))
        raise typer.Exit(LimitExceeded.exit_code)


def _print_json(command: str, result: Result, exceeded: list[str]) -> None:
    from ddqcli.render.console import json_envelope, print_plain

    code = LimitExceeded.exit_code if exceeded else 0
    print_plain(json_envelope(command, result.data(), exit_code=code, errors=exceeded))


def _require_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError("The working folder was removed; change to another one.") from error


def interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Stop a moment later, if a signal came in a callback whose exceptions Python ignores."""
    stop = unraisable.exc_value
    if not isinstance(stop, Interrupted | KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = stop.exit_code - 128 if isinstance(stop, Interrupted) else signal.SIGINT
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, _SOON)
