"""SIGINT and SIGTERM held back until a training step has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hold_signals() -> Iterator[list[int]]:
    """Within: SIGINT and SIGTERM are only noted, so that no step is cut in two. One that is left in the list comes at the end."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield caught
        return

    def note(number: int, _: object) -> None:
        caught.append(number)
        # The data loader's processes may have got the same signal; torch would raise for each that ends, amid the step.
        signal.signal(signal.SIGCHLD, lambda *_: None)

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])
