"""Silence for converters and runtimes that print from C++."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Hide whatever is printed, logged or warned about, also by code that is not Python."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        _redirect(dict.fromkeys(saved, nowhere))
        nothing = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(nothing), redirect_stderr(nothing):
            warnings.simplefilter("ignore")
            yield
    finally:
        _redirect(saved)
        for descriptor in (nowhere, *saved.values()):
            os.close(descriptor)
        logging.disable(before)


def _redirect(targets: dict[int, int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for stream_number, descriptor in targets.items():
        os.dup2(descriptor, stream_number)
