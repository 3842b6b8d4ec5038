"""The command line: help, completion, exit codes, and what goes to stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_project import ddq, exit_code, folder_of_images

import ddqcli
from ddqcli.cli.app import app
from ddqcli.errors import DDQError, Interrupted, UsageError, VerificationError

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
ENVELOPE = ["version", "command", "status", "exit_code", "data", "errors"]
README = Path(__file__).parents[2] / "README.md"


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`ddq ARGS` as a process."""
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "ddqcli", *args], capture_output=True, text=True, env=env, **options
    )


# ---- help


def test_the_module_is_the_command_and_says_its_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ddq {ddqcli.__version__}\n", "")


def test_help_lists_every_command_and_exit_code() -> None:
    for args in (["--help"], ["-h"]):
        answer = ddq(*args)
        assert answer.code == 0
        assert all(re.search(rf"^  {name} +\w", answer.out, re.M) for name in COMMANDS)
        assert all(re.search(rf"\b{code} ", answer.out) for code in (0, 1, 2, 3, 4, 130, 143))


def test_without_arguments_help_is_shown_as_an_error() -> None:
    answer = ddq()
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("Usage: ddq ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_explains_every_option(command: str) -> None:
    text = ddq(command, "--help").out
    assert text.startswith(f"Usage: ddq {command} ")
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)$", text, re.M)
    assert len(options) >= 3
    assert all(re.search(r"  \S", rest) for _, rest in options), options


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_each_command_run_as_they_stand(command: str, finished: Path) -> None:
    assert ddq("export", "-o", "model.safetensors").code == 0
    Path("runs/20260131-142310-model").symlink_to("done")
    folder_of_images(Path("images"))
    examples = re.findall(r"^ +(ddq .*)$", ddq(command, "--help").out, re.M)
    assert examples
    for example in examples:
        if command != "inspect":  # which draws for seconds; tests/commands/test_inspect.py runs it
            answer = ddq(*shlex.split(example.partition(">>")[0])[1:])
            assert answer.code == 0, f"{example}: {answer.err}"


def test_completion_knows_commands_and_options() -> None:
    script = run(
        "--show-completion",
        "bash",
        env={"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert script.returncode == 0
    assert "_DDQ_COMPLETE=complete_bash" in script.stdout
    assert script.stdout.rstrip().endswith("ddq")
    found = run(env={"_DDQ_COMPLETE": "complete_bash", "COMP_WORDS": "ddq fin", "COMP_CWORD": "1"})
    assert found.stdout.split() == ["finetune"]
    found = run(
        env={"_DDQ_COMPLETE": "complete_bash", "COMP_WORDS": "ddq report --max", "COMP_CWORD": "2"}
    )
    assert found.stdout.split() == ["--max-size", "--max-bits", "--max-drop"]


# ---- the envelope


def test_each_command_gives_one_envelope(finished: Path) -> None:
    for args in (["finetune", "model.pt", "--dry-run"], ["report"], ["export"]):
        answer = ddq(*args, "--json")
        assert answer.code == 0
        assert list(answer.envelope) == ENVELOPE
        assert {**answer.envelope, "data": None} == dict(
            version=1, command=args[0], status="ok", exit_code=0, data=None, errors=[]
        )


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["finetune", "gone.pt"], "finetune"),
        (["finetune", "--epochs", "two"], "finetune"),
        (["report", "--nonsense"], "report"),
        (["export", "a", "b", "c"], "export"),
        (["inspect"], "inspect"),
        (["nonsense"], None),
        ([], None),
    ],
)
def test_a_failure_gives_the_same_envelope_wherever_it_lies(
    project: Path, args: list[str], command: str | None
) -> None:
    answer = ddq(*args, "--json")
    assert answer.code == 2
    assert list(answer.envelope) == ENVELOPE
    assert {**answer.envelope, "errors": []} == dict(
        version=1, command=command, status="error", exit_code=2, data=None, errors=[]
    )
    assert len(answer.envelope["errors"]) == 1
    assert answer.err.endswith(f"Error: {answer.envelope['errors'][0]}\n")


# ---- exit codes, and what a fault looks like


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DDQError("It broke."), 1),
        (UsageError("It broke."), 2),
        (VerificationError("It broke."), 4),
        (Interrupted("It broke.", 2), 130),
        (Interrupted("It broke.", 15), 143),
    ],
)
def test_each_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: DDQError, code: int
) -> None:
    failing(monkeypatch, error)
    answer = ddq("report")
    assert (answer.code, answer.out, answer.err) == (code, "", "Error: It broke.\n")


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("a\nb"), RecursionError(), AssertionError()]
)
def test_even_a_bug_is_one_line_and_debug_shows_its_trace(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, error)
    answer = ddq("report")
    assert answer.code == 1
    assert answer.err.startswith(f"Error: {type(error).__name__}")
    assert answer.err.count("\n") == 1
    assert "`ddq --debug ...`" in answer.err
    for args in (["--debug", "report"], ["report", "--debug"], ["report", "--json", "--debug"]):
        shown = ddq(*args).err
        assert "Traceback" in shown
        assert shown.endswith(answer.err)


def test_ctrl_c_anywhere_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert (ddq("report").code, ddq("report").err) == (130, "Error: Interrupted\n")


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def report(*_: object) -> None:
        raise error

    monkeypatch.setattr("ddqcli.commands.report.report", report)


# ---- stdout and stderr


def test_stdout_carries_the_result_alone(project: Path) -> None:
    answer = ddq("finetune", "model.pt")
    assert "train 12/12" in answer.err
    assert "data: 64 train" in answer.err
    assert "train" not in answer.out
    assert "accuracy" in answer.out
    assert "accuracy   " not in answer.err


def test_quiet_says_nothing_but_the_result(project: Path) -> None:
    answer = ddq("finetune", "model.pt", "-q")
    assert answer.err == ""
    assert "accuracy" in answer.out


def test_quiet_still_says_what_went_wrong(project: Path) -> None:
    assert ddq("finetune", "gone.pt", "-q").err == "Error: There is no checkpoint gone.pt.\n"


def test_off_a_terminal_there_is_a_heartbeat_and_no_bar_or_colour(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddqcli.render.progress._HEARTBEAT", 0.0)
    monkeypatch.setenv(
        "TTY_COMPATIBLE", "1"
    )  # as GitHub Actions and others say of a log that is none
    answer = ddq("finetune", "model.pt", "--max-steps", "30", "--epochs", "10")
    assert [line.split(":")[0] for line in answer.err.splitlines() if line.startswith("train ")] == [
        "train 10/30", "train 20/30", "train 30/30",
    ]  # fmt: skip
    assert re.search(
        r"^train 10/30: loss \d\.\d+, \d+\.\d %, \d\.\d+ bits, \d:\d\d left$", answer.err, re.M
    )
    assert "\x1b" not in answer.err
    assert "\r" not in answer.err


def test_names_are_not_cut_short_in_a_pipe(finished: Path) -> None:
    assert "…" not in ddq("report").out
    assert max(map(len, ddq("report").out.splitlines())) <= 160


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_a_terminal_gets_a_bar_and_colours_unless_no_color_is_set(
    project: Path, no_color: str, colours: bool
) -> None:
    def on_terminal() -> None:
        os.environ.update(TERM="xterm-256color", NO_COLOR=no_color)

    seen = said_on_terminal(on_terminal, "finetune", "model.pt")
    assert "━" in seen
    assert bool(re.search(r"\x1b\[[\d;]*3\d", seen)) == colours


@pytest.mark.parametrize(
    "args", [["report"], ["report", "--json"], ["report", "--csv"], ["--help"]], ids=" ".join
)
def test_a_reader_who_leaves_early_is_no_error(finished: Path, args: list[str]) -> None:
    assert as_process(nobody(), *args) == (0, "")


def test_a_reader_who_leaves_early_hides_no_failure(finished: Path) -> None:
    code, said = as_process(nobody(), "report", "--max-bits", "1")
    assert code == 3
    assert said.startswith("Error: --max-bits is unmet")
    assert as_process(nobody(), "report", "gone", "--json")[0] == 2


def test_work_goes_on_though_nobody_reads_its_notes(project: Path) -> None:
    reader, writer = os.pipe()
    assert (
        exit_code(forked(writer, nobody(), "finetune", "model.pt", "--run-dir", "run", "--json"))
        == 0
    )
    os.close(writer)
    with os.fdopen(reader) as file:
        assert json.load(file)["status"] == "ok"


def nobody() -> int:
    """The writing end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_closed_streams_are_no_error(finished: Path) -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            f"{sys.executable} -m ddqcli report {closed}",
            shell=True,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="/dev/full, a disk that is always full, is Linux's"
)
def test_a_result_that_cannot_be_written_is_an_error(finished: Path) -> None:
    for format_ in ("--json", "--csv", "--md"):
        answer = as_process(os.open("/dev/full", os.O_WRONLY), "report", format_)
        assert answer == (1, "Error: Standard output: No space left on device.\n")
    assert as_process(os.open("/dev/full", os.O_WRONLY), "report", "gone", "--json")[0] == 2


def as_process(stdout: int, *args: str) -> tuple[int, str]:
    """`ddq ARGS` in a forked process that writes to the file `stdout`: exit code, and what it said on stderr."""
    reader, writer = os.pipe()
    child = forked(stdout, writer, *args)
    os.close(stdout)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    return exit_code(child), said


def said_on_terminal(before: Callable[[], None], *args: str) -> str:
    """What `ddq ARGS` shows on a terminal."""
    master, slave = os.openpty()
    child = forked(slave, slave, *args, before=before)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert exit_code(child) == 0
    return shown.decode()


def forked(stdout: int, stderr: int, *args: str, before: Callable[[], None] = lambda: None) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        import torch

        torch.set_num_threads(1)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
        before()
        for name in [name for name in sys.modules if name.startswith("ddqcli.render")]:
            del sys.modules[name]  # their consoles belong to the parent
        app(list(args))
    except SystemExit as stop:
        code = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ---- the example of the README


def test_the_ci_example_of_the_readme_runs_as_a_shell_script(finished: Path) -> None:
    found = re.search(
        r"<!-- ci-example -->\s*```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.S
    )
    assert found, (
        "README.md lacks the GitHub Actions example, a ```yaml block behind <!-- ci-example -->"
    )
    import yaml

    (job,) = yaml.safe_load(found[1])["jobs"].values()
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    assert len(scripts) > 2
    shutil.rmtree("runs")
    tools = Path("tools")
    tools.mkdir()
    (tools / "ddq").write_text(f'#!/bin/sh\nexec {sys.executable} -m ddqcli "$@"\n')
    (tools / "pip").write_text("#!/bin/sh\n")  # what is to be installed is here already
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tools.resolve()}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": "summary.md",
    }
    for script in scripts:  # as GitHub runs them
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}: {done.stderr}"
    assert "### ddq report" in Path("summary.md").read_text(encoding="utf-8")
    assert Path("model.safetensors").exists()
