"""Deferred SIGINT and SIGTERM, so that no training step is cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hold_signals() -> Iterator[list[int]]:
    """Hold SIGINT and SIGTERM back while the block runs. Yields the list of those received.

    A caller that handles a signal clears the list. Otherwise the first signal is raised when the
    block ends. Does nothing outside the main thread, where handlers cannot be set.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, _: object) -> None:
        received.append(number)
        # The data loader's workers may have received the same signal. torch would raise in the
        # middle of the step for each worker that ends.
        signal.signal(signal.SIGCHLD, lambda *_: None)

    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
