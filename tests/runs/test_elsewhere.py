"""Runs that `--run-dir` put elsewhere are remembered, for the working folder that began them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from made_run import make_run

from ddqcli.runs.elsewhere import remember_folder, remembered_folders
from ddqcli.runs.find import known_folders
from ddqcli.runs.run import Run


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new working folder, and a state of its own in `tmp_path`/state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def made_elsewhere(folder: Path) -> Run:
    run = make_run(folder)
    assert remember_folder(run.path) is None
    return run


def test_a_run_elsewhere_is_the_newest_until_another_is_made(working: Path) -> None:
    make_run(Path("runs", "old"))
    run = made_elsewhere(Path("../outside"))
    assert Run.open(None).path == (working.parent / "outside")
    below = made_elsewhere(Path("here"))
    assert Run.open(None).path == Path("here")
    make_run(Path("runs", "new"))
    assert known_folders() == [
        *(Path("runs/new"), below.path, run.path.resolve(), Path("runs/old"))
    ]


def test_another_working_folder_does_not_see_it(
    working: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_elsewhere(working.parent / "outside")
    monkeypatch.chdir(working.parent)
    assert known_folders() == []
    monkeypatch.chdir(working)
    assert known_folders() == [working.parent / "outside"]


def test_what_runs_shows_anyway_is_not_recorded(working: Path) -> None:
    made_elsewhere(Path("runs", "named"))
    assert remembered_folders() == []
    assert known_folders() == [Path("runs/named")]


def test_a_folder_that_was_removed_or_made_anew_is_forgotten(working: Path) -> None:
    made_elsewhere(Path("a"))
    made_elsewhere(Path("b"))
    shutil.rmtree("a")
    assert remembered_folders() == [Path("b")]
    make_run(Path("a"))  # by someone else: it has another token
    assert remembered_folders() == [Path("b")]
    made_elsewhere(Path("b2"))
    assert set(remembered_folders()) == {Path("b"), Path("b2")}


def test_damaged_lines_and_files_of_other_users_are_ignored(working: Path) -> None:
    made_elsewhere(Path("a"))
    (file,) = (working.parent / "state" / "ddq" / "elsewhere").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    lines = ["{", "[]", json.dumps({"folder": 3}), json.dumps({"folder": "/", "token": ""})]
    file.write_text("\n".join([*lines, file.read_text(), '{"folder": "cut']))
    assert remembered_folders() == [Path("a")]
    file.chmod(0o622)
    assert remembered_folders() == []


def test_a_state_that_cannot_be_written_is_a_reason(
    working: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Path("a"))
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    assert remember_folder(run.path) == "Not a directory"
    assert remembered_folders() == []
