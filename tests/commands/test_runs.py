"""`ddq runs`: what it lists, in which state, and the command that goes on."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run, make_sweep
from rich.console import Console
from tiny_project import ddq

from ddqcli.commands.runs import list_runs
from ddqcli.render.runs import show
from ddqcli.runs.run import LAST, RECIPE, REPORT, Run

ROW = ["path", "kind", "state", "created", "targets", "done", "bytes", "metric", "accuracy"]
ROW += ["warnings", "resume", "runs"]


@pytest.fixture(autouse=True)
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unfinished(folder: str) -> Run:
    run = make_run(Path(folder))
    (run.path / REPORT).unlink()
    return run


def rows(*args: str) -> list[dict[str, Any]]:
    return ddq("runs", *args, "--json").data["runs"]


def test_the_newest_run_is_the_first_and_each_has_its_figures() -> None:
    for name in ("b", "a", "c"):
        run = make_run(Path("runs", name))
    assert [row["path"] for row in rows()] == ["runs/c", "runs/a", "runs/b"]
    (row, *_), report = rows(), run.report()
    assert list(row) == ROW
    assert row["created"].startswith("20")
    assert row["created"].endswith("+00:00")
    assert {**row, "created": None} == {
        "path": "runs/c",
        "kind": "run",
        "state": "finished",
        "created": None,
        "targets": ["4 bits"],
        "done": 1.0,
        "bytes": report.totals.bytes,
        "metric": report.metric.data(),
        "accuracy": report.accuracy.data(),
        "warnings": list(report.warnings),
        "resume": None,
        "runs": [],
    }
    header, first, *_ = ddq("runs").out.splitlines()
    assert header.split() == ["run", "state", "target", "bytes", "accuracy", "warnings"]
    assert first.split() == [
        *("runs/c", "finished", "4", "bits", f"{report.totals.bytes:,}", "91.25%", "1")
    ]


def test_an_unfinished_run_shows_the_command_that_goes_on() -> None:
    run = unfinished("runs/a run")
    (row,) = rows()
    assert (row["state"], row["done"], row["bytes"]) == ("unfinished", 1.0, None)
    assert shlex.split(row["resume"]) == [
        *("ddq", "finetune", "--resume", "--run-dir", "runs/a run")
    ]
    assert ddq("runs").out.splitlines()[-1] == f"go on      {row['resume']}"
    with run.locked():
        (row,) = rows()
        assert (row["state"], row["resume"]) == ("running", None)


def test_the_command_that_goes_on_finishes_the_run(project: Path) -> None:
    answer = ddq("finetune", "model.pt", "--max-steps", "2", "--run-dir", "else where")
    assert answer.code == 0
    assert "run: else where" in answer.err.splitlines()
    Path("else where", REPORT).unlink()
    (row,) = rows()
    assert (row["path"], row["state"]) == ("else where", "unfinished")
    assert ddq(*shlex.split(row["resume"])[1:]).code == 0
    assert [(row["path"], row["state"]) for row in rows()] == [("else where", "finished")]
    assert ddq("report", "--json").data["target"] == "else where"


def test_without_a_place_for_records_the_run_is_found_by_name_only(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    answer = ddq("finetune", "model.pt", "--epochs", "0", "--run-dir", "out")
    assert answer.code == 0
    assert "find it by its name only: no record is kept (Not a directory)" in answer.err
    assert ddq("runs").out.startswith("no runs in runs/")
    assert ddq("report", "out").code == 0


def test_a_sweep_is_listed_with_its_runs() -> None:
    sweep = make_sweep(Path("runs/s"), 4, 3, finished=False)
    (sweep.path / "3-bits" / REPORT).unlink()
    (row,) = rows()
    assert (row["kind"], row["state"], row["done"]) == ("sweep", "unfinished", 0.5)
    assert row["targets"] == ["4 bits", "3 bits"]
    assert row["resume"] == "ddq finetune --resume --run-dir runs/s"
    assert [(run["path"], run["state"]) for run in row["runs"]] == [
        *[("runs/s/4-bits", "finished"), ("runs/s/3-bits", "unfinished")]
    ]
    lines = ddq("runs").out.splitlines()
    assert lines[1].split() == ["runs/s", "sweep,", "unfinished", "50%", "2", "targets"]
    assert lines[2].split()[:2] == ["4-bits", "finished"]
    assert [line for line in lines if line.startswith("go on")] == [
        "go on      ddq finetune --resume --run-dir runs/s"
    ]


def test_damaged_runs_do_not_hide_the_others() -> None:
    for name in ("report", "recipe", "metrics", "whole"):
        make_run(Path("runs", name))
    Path("runs/report", REPORT).write_text("{")
    Path("runs/recipe", RECIPE).write_text("budget: 3")
    Path("runs/metrics", REPORT).unlink()
    Path("runs/metrics/metrics.jsonl").write_text('{"step": 3}\n')
    found = {row["path"]: (row["state"], bool(row["resume"])) for row in rows()}
    assert found == {
        "runs/report": ("damaged", True),
        "runs/recipe": ("damaged", False),
        "runs/metrics": ("unfinished", True),
        "runs/whole": ("finished", False),
    }
    assert ddq("runs").code == 0


def test_a_folder_may_be_named() -> None:
    make_run(Path("here"))
    make_run(Path("deep/down"))
    Path("deep", "notes").mkdir()
    assert [row["path"] for row in rows(".")] == ["here"]
    assert [row["path"] for row in rows("deep")] == ["deep/down"]
    assert [row["path"] for row in rows("deep/down")] == ["deep/down"]
    assert ddq("runs", "gone").err == "Error: There is no folder gone.\n"


def test_without_runs_it_says_so() -> None:
    assert rows() == []
    assert ddq("runs").out == "no runs in runs/; `ddq finetune MODEL` makes one\n"


def test_runs_of_different_metrics_name_them() -> None:
    make_run(Path("runs/a"))
    run = make_run(Path("runs/b"))
    report = run.report()
    psnr = report.metric.model_copy(update={"name": "PSNR", "unit": "dB"})
    run.write_report(report.model_copy(update={"metric": psnr}))
    out = ddq("runs").out
    assert "PSNR 91.25 dB" in out
    assert "accuracy 91.25%" in out


def test_without_warnings_there_is_no_column_of_them() -> None:
    run = make_run(Path("runs/a"))
    run.write_report(run.report().model_copy(update={"warnings": ()}))
    assert "warnings" not in ddq("runs").out
    assert rows()[0]["warnings"] == []
    make_run(Path("runs/b"))
    header, b, a = ddq("runs").out.splitlines()
    assert header.split()[-1] == "warnings"
    assert (b.split()[-1], a.split()[-1]) == ("1", "91.25%")


@pytest.mark.parametrize("name", ["a", "20260131-142310-a-name-of-a-model-that-is-long"])
def test_no_column_is_cut_at_80_columns(name: str) -> None:
    make_run(Path("runs", name))
    text = io.StringIO()
    show(list_runs(), Console(file=text, width=80, force_terminal=True, color_system=None))
    header, row, *_ = re.sub("\x1b\\[[0-9]*m", "", text.getvalue()).splitlines()
    assert header.split()[-1] == "warnings"
    assert row.split()[1:4] == ["finished", "4", "bits"]
    assert row.split()[-2:] == ["91.25%", "1"]


def test_a_begun_run_without_a_step_is_listed() -> None:
    run = unfinished("runs/a")
    (run.path / "metrics.jsonl").unlink()
    (run.path / LAST).unlink(missing_ok=True)
    (row,) = rows()
    assert (row["state"], row["done"]) == ("unfinished", 0.0)
