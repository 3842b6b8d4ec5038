"""One command in a fork or a new interpreter, under limits of memory and time, and its faults."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ddqcli.cli.app import main

MEMORY = 2 << 30  # bytes more than the parent has
SECONDS = int(os.environ.get("DDQ_TRIAL_SECONDS", "60"))
CODES = {0, 1, 2, 3, 4}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")


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
        if control := _CONTROL.search(self.out + self.err):
            return f"exit code {self.code}: control code {control[0]!r} in the output"
        return ""


def start(command: str, name: str, before: Callable[[], object] = lambda: None) -> int:
    """Run `ddq COMMAND` in a fork, with output to name.out and name.err; return its id.

    The fork leads a process group. It calls the entry point as a new interpreter would.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        for number, stream in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{name}.{stream}", flags), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.argv = ["ddq", *command.split()]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        signal.alarm(SECONDS)
        before()
    except BaseException:
        os._exit(99)
    _exit_as_an_interpreter()


def _exit_as_an_interpreter() -> NoReturn:
    """Call the entry point and exit with its code, without the exit functions of the parent."""
    code: object = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def end(child: int, name: str) -> Outcome:
    """Wait for a fork of `start`, and end what it left behind."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    paths = [Path(f"{name}.{end}") for end in ("out", "err")]
    return Outcome(code, *(p.read_text(errors="replace") if p.exists() else "" for p in paths))


def run(
    command: str,
    before: Callable[[], object] = lambda: None,
    signals: tuple[tuple[float, int], ...] = (),
) -> Outcome:
    """Run `ddq COMMAND` in a fork; send it each signal after so many seconds more."""
    child = start(command, "std", before)
    for seconds, number in signals:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(child, number)
    return end(child, "std")


def run_anew(command: str, redirections: str, variables: Mapping[str, str | None]) -> Outcome:
    """Run `ddq COMMAND` in a new interpreter, with redirections of a shell and variables."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for name, value in variables.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    line = f"exec {sys.executable} -m ddqcli {command} {redirections}"
    with open("std.out", "w") as out, open("std.err", "w") as err:
        child = subprocess.Popen(
            ["sh", "-c", line], env=environment, stdout=out, stderr=err, start_new_session=True
        )
        with suppress(subprocess.TimeoutExpired):
            child.wait(SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    texts = (Path(f"std.{name}").read_text(errors="replace") for name in ("out", "err"))
    return Outcome(child.wait(), *texts)
