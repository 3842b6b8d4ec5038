"""Run folders are created, found, locked and removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_run import make_report
from run_files import names

from ddqcli.errors import UsageError
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import LAST, RECIPE, REPORT, Run


def test_a_folder_is_named_after_time_and_model_and_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260131-142310")
    folders = [Run.create(None, "a/../b c").path for _ in range(3)]
    assert [path.name for path in folders] == [
        f"20260131-142310-a-..-b-c{end}" for end in ("", "-1", "-2")
    ]
    assert all(path.parent == Path("runs") and path.is_dir() for path in folders)


def test_a_folder_that_holds_a_run_is_not_reused(run: Run) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        Run.create(run.path, "name")


def test_the_newest_finished_and_the_newest_unfinished_run_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("adcb"):
        run = Run.create(Path("runs") / name, name)
        run.write_recipe(Recipe())
        os.utime(run.path / RECIPE, (number, number))
        if name in "ad":
            run.write_report(make_report())
            os.utime(run.path / REPORT, (number, number))
    assert Run.open(None).path.name == "d"
    assert Run.unfinished(None).path.name == "b"


def test_an_untrained_folder_is_removed_but_no_file_of_the_user(run: Run) -> None:
    (run.path / "notes.txt").write_text("mine")
    run.remove_if_untrained()
    assert names(run) == {"notes.txt"}
    (run.path / "notes.txt").unlink()
    run.remove_if_untrained()
    assert not run.path.exists()


def test_two_processes_cannot_work_in_one_folder(run: Run) -> None:
    with (
        run.locked(),
        pytest.raises(UsageError, match="Another process is working in"),
        run.locked(),
    ):
        pass
    with run.locked():
        pass


def test_temporary_files_of_a_killed_process_are_removed(run: Run) -> None:
    (run.path / f".{LAST}.4242.tmp").write_bytes(b"half")
    with run.locked():
        assert names(run) == {RECIPE, ".lock"}


def test_an_error_under_the_lock_is_passed_on(run: Run) -> None:
    with pytest.raises(FileNotFoundError), run.locked():
        raise FileNotFoundError("data")
