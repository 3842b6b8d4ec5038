"""Ctrl-C and SIGTERM as exceptions. They are noted: code in C may turn them into other errors."""

from __future__ import annotations

import signal
from typing import NoReturn

from ddqcli.errors import Interrupted

_noted: list[int] = []  # signals of this command


def watch_ctrl_c() -> None:
    """Note Ctrl-C from here on, unless it is ignored or a handler of another program is set."""
    _noted.clear()
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _interrupt):
        signal.signal(signal.SIGINT, _interrupt)


def watch_sigterm() -> None:
    """Raise Interrupted on SIGTERM from here on."""
    signal.signal(signal.SIGTERM, _terminate)


def as_interruption(error: Exception | Interrupted) -> Exception | Interrupted:
    """Return Interrupted in place of an error that a signal's exception has become."""
    if not _noted or isinstance(error, Interrupted):
        return error
    number = _noted[0]
    return Interrupted("Terminated" if number == signal.SIGTERM else "Interrupted", number)


def _interrupt(number: int, frame: object) -> NoReturn:
    _noted.append(number)
    raise KeyboardInterrupt


def _terminate(number: int, frame: object) -> NoReturn:
    _noted.append(number)
    raise Interrupted("Terminated", number)
