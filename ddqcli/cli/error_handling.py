"""Turn every exception into one message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ddqcli.cli.interruption import as_interruption, watch_ctrl_c
from ddqcli.errors import DDQError, Interrupted
from ddqcli.formatting import did_you_mean, visible

# ClickException of Typer's parser, which moved between Typer versions.
_ParserError: Any = typer.BadParameter.__base__
_TYPERS_CTRL_C = 130  # what its parser returns, without a word, before a command has begun
_NO_NUMBER = re.compile(r"Input should be a valid (integer|number), unable to parse.*", re.S)
_NO_CHOICE = re.compile(r"'([^']*)' is not one of (.*)", re.S)


class ErrorHandlingGroup(TyperGroup):
    """Command group whose `main` reports any error, of the parser or of a command, and exits."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command and exit; `--debug` may stand anywhere, so it can end a failed line."""
        watch_ctrl_c()
        all_args = list(sys.argv[1:] if args is None else args)
        args = [arg for arg in all_args if arg != "--debug"]
        try:
            code = super().main(args, "ddq", complete_var, False, windows_expand_args, **extra)
            if code == _TYPERS_CTRL_C:
                raise Interrupted("Interrupted", signal.SIGINT)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as stop:
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, BrokenPipeError):
                raise
            discard_stdout()  # the reader closed the pipe, as `head` does
            code = 0
        except (Exception, Interrupted) as error:
            if "--debug" in all_args:
                traceback.print_exc()
            command = next((arg for arg in args if arg in self.commands), None)
            code = _report_error(as_interruption(error), command, as_json="--json" in args)
        sys.exit(code if isinstance(code, int) else 0)


def _report_error(error: Exception | Interrupted, command: str | None, as_json: bool) -> int:
    """Print the error to stderr, and with `as_json` an envelope to stdout; return the exit code."""
    message, code = _message_and_code(error, command)
    if isinstance(error, OSError) and error.filename is None:
        discard_stdout()  # it cannot be written to
    if as_json:
        from ddqcli.render.console import json_envelope, print_plain

        try:
            print_plain(json_envelope(command, exit_code=code, errors=[message]))
            sys.stdout.flush()
        except OSError:
            discard_stdout()
    print_error(message)
    return code


def _message_and_code(error: Exception | Interrupted, command: str | None) -> tuple[str, int]:
    if isinstance(error, DDQError | Interrupted):
        return str(error), error.exit_code
    if isinstance(error, _ParserError):
        message = _parser_message(error)
        if message.startswith("Usage:"):  # `ddq` without arguments
            return message, 2
        end = "" if message.endswith(("?", ".")) else "."
        help_command = f"ddq {command} --help" if command else "ddq --help"
        return f"{message}{end} `{help_command}` lists the options.", 2
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{error.filename}: {error.strerror}.", 2
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'Standard output'}: {error.strerror}.", 1
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # of torch
        return "There is not enough memory for this.", 1
    detail = " ".join(str(error).split())[:300]
    name = f"{type(error).__name__}: {detail}" if detail else type(error).__name__
    return f"{name}; `ddq --debug ...` shows the traceback.", 1


def _parser_message(error: Any) -> str:
    """Return the message of an error of Typer's parser; a wrong option is named with a likely one.

    The parser's own suggestions know only the letters of the names.
    """
    if not (hasattr(error, "option_name") and hasattr(error, "possibilities") and error.ctx):
        text: str = error.format_message()
        return _plain_words(text, error.__cause__)
    from ddqcli.cli.suggestions import suggest_option

    options = {
        option: getattr(parameter, "help", None) or ""
        for parameter in error.ctx.command.params
        for option in parameter.opts
    }
    return f"{error.message}{suggest_option(error.option_name, options)}"


def _plain_words(text: str, cause: Any) -> str:
    """Return a message about a wrong value as one of the command line, and with a likely value.

    Some versions of Typer let pydantic, the `cause`, validate and word it.
    """
    text = text.replace("Value error, ", "")
    if (number := _NO_NUMBER.search(text)) and hasattr(cause, "errors"):
        wrong = cause.errors()[0]["input"]
        text = f"{text[: number.start()]}{wrong!r} is not a valid {number[1]}"
    if choice := _NO_CHOICE.search(text):
        text = text.rstrip(".") + did_you_mean(choice[1], re.findall("'([^']+)'", choice[2]))
    return text


def print_error(message: str) -> None:
    """Print a message to stderr, prefixed with "Error: " unless it is a usage text."""
    message = "\n".join(map(visible, message.split("\n")))
    with suppress(OSError):
        sys.stderr.write(f"{message}\n" if message.startswith("Usage:") else f"Error: {message}\n")


def discard_stdout() -> None:
    """Send stdout to /dev/null, also what Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
