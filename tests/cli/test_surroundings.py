"""Odd surroundings: it works, or it is one sentence with the documented exit code."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import make_run
from tiny_project import ddq

from ddqcli.cli.run_command import Result, interrupt_again, run_command
from ddqcli.errors import Interrupted

REPOSITORY = str(Path(__file__).parents[2])


def process(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ddqcli", *args]
    env = {**os.environ, "PYTHONPATH": REPOSITORY, **environment}
    return subprocess.run(command, capture_output=True, env=env, timeout=120)


# ---- variables of launchers


def test_a_rank_alone_is_no_torchrun(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    answer = ddq("finetune", "model.pt", "--max-steps", "0", "--json", "-q")
    assert answer.code == 0
    assert answer.data["run_dir"]


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT missing"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT missing"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "MASTER_ADDR and MASTER_PORT missing"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x asks for several processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK=2 is no rank in it",
        ),
    ],
)
def test_half_of_a_torchrun_is_refused(
    project: Path, variables: dict[str, str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = ddq("finetune", "model.pt", "--json")
    assert answer.code == 2
    assert fault in answer.err
    assert answer.envelope["exit_code"] == 2


# ---- terminals and folders


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stdout_of_few_characters_gets_all_results(tmp_path: Path, encoding: str) -> None:
    make_run(tmp_path / "rün", names=["模型.weight", "x"])
    options = ("--csv", "--md", "--json", "--quiet") if encoding == "ascii" else ("--md",)
    for option in options:
        chosen = [] if option == "--quiet" else [option]
        done = process("report", str(tmp_path / "rün"), *chosen, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert rb"\u6a21\u578b.weight" in done.stdout
        assert not done.stderr


def test_a_working_folder_that_was_removed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in ("report", "export", "finetune model.pt", "inspect model.pt"):
        answer = ddq(*command.split())
        assert (answer.code, answer.err) == (
            2,
            "Error: The working folder was removed; change to another one.\n",
        )


@pytest.mark.parametrize("name", ["n" * 255, "n" * 300, "模" * 100])
@pytest.mark.parametrize(
    "command", ["report {}", "export {}", "inspect {}", "finetune {}", "finetune --data {}"]
)
def test_a_name_that_is_too_long_is_one_sentence(project: Path, command: str, name: str) -> None:
    answer = ddq(*command.format(name).split())
    assert answer.code == 2
    assert answer.err.count("Error: ") == 1
    assert "--debug" not in answer.err


@pytest.mark.parametrize(
    ("command", "end"), [("export -o", ".safetensors"), ("report --html", ".html")]
)
def test_an_output_may_have_a_name_as_long_as_there_are(
    finished: Path, command: str, end: str
) -> None:
    name = "n" * (255 - len(end)) + end
    assert ddq(*command.split(), name).code == 0
    assert Path(name).is_file()


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Otherwise, it would get what torch writes to number 2."""
    code = f"""
import os, sys
sys.path.insert(0, {REPOSITORY!r})
import ddqcli.cli.app as app
def work():
    with open("numbers", "w") as file:
        file.write(f"{{[os.fstat(n).st_rdev == os.stat(os.devnull).st_rdev for n in range(3)]}}")
        file.write(f" {{file.fileno() > 2}}")
app.app = work
app.main()
"""
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=120).returncode == 0
    assert (tmp_path / "numbers").read_text() == "[True, True, True] True"


# ---- signals


def test_a_signal_in_a_callback_that_cannot_raise_still_ends_the_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", interrupt_again)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}

    class Tidy:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> Result:
        Tidy()  # what is raised while it is deleted cannot leave
        for _ in range(1000):
            signal.sigtimedwait([], 0.01)
        raise AssertionError("the signal was lost")

    try:
        with pytest.raises(Interrupted, match="Terminated"):
            run_command("report", work, lambda _: None, as_json=False)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("name", "then"), [("nonsense", "agg"), ("svg", "svg")])
def test_an_unknown_backend_of_matplotlib_is_not_needed(name: str, then: str) -> None:
    code = "import ddqcli.plots, os, matplotlib as m; m.use(m.rcParams['backend'])"
    code += "; print(m.get_backend(), os.environ['MPLBACKEND'])"
    env = {**os.environ, "PYTHONPATH": REPOSITORY, "MPLBACKEND": name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, text=True)
    assert (done.stdout.split(), done.returncode) == ([then, name], 0), done.stderr
