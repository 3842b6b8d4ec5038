"""The command line: help, completion, exit codes, and what goes to stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from made_run import make_sweep
from tiny_project import ddq, exit_code, folder_of_images
from typer.testing import CliRunner

import ddqcli
from ddqcli.checkpoint.torchvision_models import classifier_names
from ddqcli.cli.app import app
from ddqcli.cli.completion import recipe_keys, torchvision_names
from ddqcli.cli.error_handling import ErrorHandlingGroup
from ddqcli.errors import DDQError, Interrupted, UsageError, VerificationError
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.names import MARKER

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
ENVELOPE = ["version", "command", "status", "exit_code", "data", "errors"]
README = Path(__file__).parents[2] / "README.md"


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `ddq ARGS` as a process."""
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "ddqcli", *args], capture_output=True, text=True, env=env, **options
    )


# ---- help


def test_python_m_ddqcli_is_ddq_and_prints_its_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ddq {ddqcli.__version__}\n", "")


def test_help_lists_every_command_and_exit_code() -> None:
    for args in (["--help"], ["-h"]):
        answer = ddq(*args)
        assert answer.code == 0
        assert all(re.search(rf"^  {name} +\w", answer.out, re.M) for name in COMMANDS)
        assert all(re.search(rf"\b{code} ", answer.out) for code in (0, 1, 2, 3, 4, 130, 143))


def test_without_arguments_ddq_prints_its_help_as_an_error() -> None:
    answer = ddq()
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("Usage: ddq ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_explains_every_option(command: str) -> None:
    text = ddq(command, "--help").out
    assert text.startswith(f"Usage: ddq {command} ")
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)$", text, re.M)
    assert len(options) >= 2
    assert all(re.search(r"  \S", rest) for _, rest in options), options


@pytest.mark.parametrize("command", ["init", "finetune", "report", "export", "runs"])
def test_the_examples_in_the_help_run(command: str, finished: Path, exported_file: Path) -> None:
    shutil.copytree("runs/done", "runs/20260131-142310-model")
    if command == "report":
        shutil.copy(exported_file, "model.safetensors")
        sweep = make_sweep(Path("runs/20260131-150210-model"), 8, 4)
        (sweep.path / MARKER).write_text(f"{'0' * 32} 1\n")  # older than the run
    if command == "init":
        Path("ddq.yaml").unlink()
    folder_of_images(Path("images"))
    extra = ["--max-steps", "1"] if command == "finetune" else []  # to be fast
    for example in examples_of(command):
        answer = ddq(*shlex.split(example.partition(">>")[0])[1:], *extra)
        assert answer.code == 0, f"{example}: {answer.err}"


def test_the_examples_of_inspect_name_a_model_and_a_folder(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures take seconds; tests/inspection draws them."""
    calls: list[tuple[Path, Path]] = []
    shutil.copytree("runs/done", "runs/20260131-142310-model")

    def inspect(model: Path, *, out: Path, **_: object) -> None:
        assert model.exists()
        calls.append((model, out))
        raise DDQError("not drawn")

    monkeypatch.setattr("ddqcli.commands.inspect.inspect", inspect)
    for example in examples_of("inspect"):
        assert ddq(*shlex.split(example)[1:]).err == "Error: not drawn\n"
    assert [str(out) for _, out in calls] == [
        "inspect/model",
        "pictures",
        "inspect/20260131-142310-model",
    ]


def examples_of(command: str) -> list[str]:
    examples = re.findall(r"^ +(ddq .*)$", ddq(command, "--help").out, re.M)
    assert examples
    return examples


def test_completion_knows_commands_and_options() -> None:
    env = {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = run("--show-completion", "bash", env=env)
    assert script.returncode == 0
    assert "_DDQ_COMPLETE=complete_bash" in script.stdout
    assert script.stdout.rstrip().endswith("ddq")
    assert completions("ddq fin", 1) == ["finetune"]
    assert completions("ddq report --max", 2) == [
        *("--max-size", "--max-bits", "--max-drop", "--max")
    ]


def test_completion_offers_recipe_keys_and_architectures() -> None:
    assert completions("ddq finetune --set train.le", 3) == ["train.levels_lr="]
    assert completions("ddq finetune --set train.distill.", 3) == [
        *("train.distill.weight=", "train.distill.temperature=", "train.distill.layers=")
    ]
    assert completions("ddq finetune --arch resnet1", 3) == ["resnet18", "resnet101", "resnet152"]
    assert "mobilenet_v2" in completions("ddq init --arch m", 3)
    assert completions("ddq finetune --arch nothing", 3) == []


def test_the_architectures_offered_are_those_of_torchvision() -> None:
    assert set(torchvision_names()) == set(classifier_names())


def test_each_key_offered_can_be_set() -> None:
    keys = [key.removesuffix("=") for key, _ in recipe_keys("")]
    assert len(keys) == len(set(keys)) > 50
    for key in keys:
        reduce(getattr, key.split("."), Recipe())
    assert "train.teacher.checkpoint" in keys


def completions(words: str, index: int) -> list[str]:
    env = {"_DDQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index)}
    return CliRunner().invoke(app, [], env=env).stdout.split()


# ---- the envelope


def test_each_command_prints_one_envelope(finished: Path) -> None:
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
def test_every_failure_prints_the_same_envelope(
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


# ---- exit codes and error messages


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
def test_an_unexpected_error_is_one_line_and_debug_shows_its_traceback(
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


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert (ddq("report").code, ddq("report").err) == (130, "Error: Interrupted\n")


def test_ctrl_c_before_a_command_begins_has_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(ErrorHandlingGroup, "invoke", interrupted)
    answer = ddq("report", "--json")
    assert (answer.code, answer.err) == (130, "Error: Interrupted\n")
    assert answer.envelope["errors"] == ["Interrupted"]


@pytest.mark.parametrize(
    ("number", "message", "code"),
    [(signal.SIGINT, "Interrupted", 130), (signal.SIGTERM, "Terminated", 143)],
)
def test_a_signal_that_code_in_c_turns_into_another_error_stays_one(
    monkeypatch: pytest.MonkeyPatch, number: int, message: str, code: int
) -> None:
    def schema_error(*_: object, **__: object) -> NoReturn:
        with suppress(KeyboardInterrupt, Interrupted):
            signal.raise_signal(number)
        raise ValueError("Error building `nullable` serializer")

    monkeypatch.setattr("ddqcli.commands.report.report", schema_error)
    answer = ddq("report")
    assert (answer.code, answer.err) == (code, f"Error: {message}\n")
    failing(monkeypatch, ValueError("Another one"))  # the next command is a new one
    assert ddq("report").code == 1


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `ddq report` raise this error."""

    def report(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ddqcli.commands.report.report", report)


# ---- stdout and stderr


def test_stdout_carries_only_the_result(project: Path) -> None:
    answer = ddq("finetune", "model.pt")
    assert "step 12/12" in answer.err
    assert "data: 70 train, 10 held-out and 32 evaluation images" in answer.err
    assert not re.search(r"^step ", answer.out, re.M)
    assert "accuracy" in answer.out
    assert "accuracy   " not in answer.err


def test_quiet_prints_only_the_result(project: Path) -> None:
    answer = ddq("finetune", "model.pt", "-q")
    assert answer.err == ""
    assert "accuracy" in answer.out


def test_quiet_still_prints_errors(project: Path) -> None:
    assert ddq("finetune", "gone.pt", "-q").err == (
        f"Error: There is no checkpoint gone.pt in {Path.cwd()}; it has model.pt.\n"
    )


def test_without_a_terminal_progress_is_plain_lines(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddqcli.render.progress.HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # set by GitHub Actions, whose log is no terminal
    answer = ddq("finetune", "model.pt", "--max-steps", "30", "--epochs", "10")
    train_lines = [line for line in answer.err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in train_lines] == [
        "step 10/30",
        "step 20/30",
        "step 30/30",
    ]
    assert re.search(
        r"^step 10/30: train loss \d\.\d+, held-out loss \d\.\d+, held-out accuracy \d+\.\d+ %, "
        r"\d\.\d+ bits, \d:\d\d elapsed, \d:\d\d left$",
        answer.err,
        re.M,
    )
    assert "\x1b" not in answer.err
    assert "\r" not in answer.err


def test_the_last_lines_are_commands_that_work(project: Path) -> None:
    out = ddq("finetune", "model.pt", "--max-steps", "1", "--run-dir", "a run", "-q").out
    commands = [line.removeprefix("next").strip() for line in out.splitlines()[-2:]]
    assert commands == ["ddq report 'a run'", "ddq export 'a run'"]
    for command in commands:
        assert ddq(*shlex.split(command)[1:]).code == 0


def test_common_training_settings_have_flags(project: Path) -> None:
    flags = ["--lr", "0.003", "--batch-size", "24", "--workers", "0", "--device", "cpu"]
    assert ddq("finetune", "model.pt", "--max-steps", "1", "--run-dir", "runs/a", *flags).code == 0
    recipe = yaml.safe_load(Path("runs/a/recipe.yaml").read_text())
    assert (recipe["train"]["lr"], recipe["train"]["device"]) == (0.003, "cpu")
    assert (recipe["data"]["batch_size"], recipe["data"]["workers"]) == (24, 0)


def test_layer_names_stay_whole_in_a_pipe(finished: Path) -> None:
    assert "…" not in ddq("report").out
    assert max(map(len, ddq("report").out.splitlines())) <= 160


@pytest.mark.parametrize(("no_color", "colors"), [("", True), ("1", False)])
def test_a_terminal_gets_a_bar_and_colors_unless_no_color_is_set(
    project: Path, no_color: str, colors: bool
) -> None:
    def on_terminal() -> None:
        os.environ.update(TERM="xterm-256color", NO_COLOR=no_color)

    output = output_on_terminal(on_terminal, "finetune", "model.pt")
    assert "━" in output
    assert bool(re.search(r"\x1b\[[\d;]*3\d", output)) == colors


@pytest.mark.parametrize(
    "args", [["report"], ["report", "--json"], ["report", "--csv"], ["--help"]], ids=" ".join
)
def test_a_closed_pipe_is_no_error(finished: Path, args: list[str]) -> None:
    assert as_process(closed_pipe(), *args) == (0, "")


def test_a_closed_pipe_hides_no_failure(finished: Path) -> None:
    code, message = as_process(closed_pipe(), "report", "--max-bits", "1")
    assert code == 3
    assert message.startswith("Error: --max-bits is unmet")
    assert as_process(closed_pipe(), "report", "gone", "--json")[0] == 2


def test_a_closed_stderr_does_not_stop_the_work(project: Path) -> None:
    reader, writer = os.pipe()
    assert (
        exit_code(
            forked(writer, closed_pipe(), "finetune", "model.pt", "--run-dir", "run", "--json")
        )
        == 0
    )
    os.close(writer)
    with os.fdopen(reader) as file:
        assert json.load(file)["status"] == "ok"


def closed_pipe() -> int:
    """Return the writing end of a pipe that has no reader."""
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full, a full disk")
def test_a_full_disk_behind_stdout_is_an_error(finished: Path) -> None:
    for format_ in ("--json", "--csv", "--md"):
        answer = as_process(os.open("/dev/full", os.O_WRONLY), "report", format_)
        assert answer == (1, "Error: Standard output: No space left on device.\n")
    assert as_process(os.open("/dev/full", os.O_WRONLY), "report", "gone", "--json")[0] == 2


def as_process(stdout: int, *args: str) -> tuple[int, str]:
    """Run `ddq ARGS` in a fork that writes to file descriptor `stdout`: exit code and stderr."""
    reader, writer = os.pipe()
    child = forked(stdout, writer, *args)
    os.close(stdout)
    os.close(writer)
    with os.fdopen(reader) as file:
        errors = file.read()
    return exit_code(child), errors


def output_on_terminal(before: Callable[[], None], *args: str) -> str:
    """Return the output of `ddq ARGS` on a terminal."""
    master, slave = os.openpty()
    child = forked(slave, slave, *args, before=before)
    os.close(slave)
    output = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        output += piece
    os.close(master)
    assert exit_code(child) == 0
    return output.decode()


def forked(stdout: int, stderr: int, *args: str, before: Callable[[], None] = lambda: None) -> int:
    """Fork a process that calls `before` and runs `ddq ARGS` on these streams; return its id."""
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
            del sys.modules[name]  # their consoles write to the parent's streams
        app(list(args))
    except SystemExit as stop:
        code = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ---- the CI example of the README

# Bash runs the script lines with this `ddq`, which records its arguments, one call per line.
RECORDER = """#!/usr/bin/env python3
import json, sys
print(json.dumps(sys.argv[1:]), file=open("calls.jsonl", "a"))
"""


def test_the_ci_example_of_the_readme_runs_as_a_shell_script(finished: Path) -> None:
    block = re.search(
        r"<!-- ci-example -->\s*```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.S
    )
    assert block, "README.md lacks a ```yaml block after <!-- ci-example -->"
    (job,) = yaml.safe_load(block[1])["jobs"].values()
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    assert len(scripts) > 2
    for name, script in (("ddq", RECORDER), ("pip", "#!/bin/sh\n")):
        path = Path("tools", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{Path('tools').resolve()}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": "summary.md",
    }
    for script in scripts:  # as GitHub runs them
        subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=env, check=True)
    assert Path("summary.md").exists()
    shutil.rmtree("runs")
    for line in Path("calls.jsonl").read_text().splitlines():
        args = json.loads(line)
        answer = ddq(*args)
        assert answer.code == 0, f"{args}: {answer.err}"
        assert ("--md" in args) == answer.out.startswith("### ddq report")
    assert Path("model.safetensors").exists()
