"""One command in a fork, under limits of memory and time: its end, and what is wrong with it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiny_project import ddq

from ddqcli.cli.run_command import interrupt_again

MEMORY = 2 << 30  # bytes more than the parent has
SECONDS = 60
CODES = {0, 1, 2, 3, 4}


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    code: int  # minus the signal that ended it
    out: str
    err: str

    def fault(self, codes: set[int] = CODES) -> str:
        """Return what must not be, or ""."""
        if self.code not in codes:
            return f"exit code {self.code}: {self.err[-200:]}"
        if "Traceback" in self.err or "Exception ignored" in self.err or "--debug" in self.err:
            return f"unforeseen: {self.err[-200:]}"
        if self.code > 0 and not self.err.strip():
            return f"exit code {self.code} without a word"
        return ""


def start(command: str, name: str, before: Callable[[], object] = lambda: None) -> int:
    """Run `ddq COMMAND` in a fork, with output to name.out and name.err; return its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        for number, end in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{name}.{end}", flags), number)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        signal.alarm(SECONDS)
        sys.unraisablehook = interrupt_again  # as `main` does
        before()
        answer = ddq(*command.split())
        os.write(1, answer.out.encode())
        os.write(2, answer.err.encode())
        code = answer.code
    finally:
        os._exit(code)


def end(child: int, name: str) -> Outcome:
    """Wait for a fork of `start`."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    paths = [Path(f"{name}.{end}") for end in ("out", "err")]
    return Outcome(code, *(p.read_text(errors="replace") if p.exists() else "" for p in paths))


def run(command: str, before: Callable[[], object] = lambda: None, after: float = 0.0) -> Outcome:
    """Run `ddq COMMAND` in a fork; send it SIGTERM after so many seconds, unless that is 0."""
    child = start(command, "std", before)
    if after:
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
    return end(child, "std")
