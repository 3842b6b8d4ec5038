"""Run folders are created, found, locked and removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import make_report
from run_files import Metrics, names

from ddqcli.errors import UsageError
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.files import temporary_name
from ddqcli.runs.marker import token_of
from ddqcli.runs.run import LAST, METRICS, RECIPE, REPORT, Run


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
        os.utime(run.path / RECIPE, (9 - number, 9 - number))  # as a copy might have it
        if name in "ad":
            run.write_report(make_report())
            os.utime(run.path / REPORT, (9 - number, 9 - number))
    another_tool = Path("runs", "train", "exp1")
    another_tool.mkdir(parents=True)
    for name in (RECIPE, REPORT):
        (another_tool / name).write_text("{}")
        (another_tool.parent / name).write_text("{}")
    assert Run.open(None).path.name == "d"
    assert Run.unfinished(None).path.name == "b"


def test_an_untrained_folder_is_removed_but_no_file_of_the_user(run: Run) -> None:
    (run.path / "notes.txt").write_text("mine")
    run.remove_if_untrained()
    assert names(run) == {"notes.txt"}
    run.remove_if_untrained()
    assert names(run) == {"notes.txt"}


def test_an_untrained_folder_is_removed(run: Run) -> None:
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


def test_temporary_files_of_a_killed_process_are_removed_and_no_others(run: Run) -> None:
    mine = {".notes.tmp", f".{LAST}.4242.tmp", ".ddq-notes.tmp"}
    for name in (*mine, temporary_name(token_of(run.path))):
        (run.path / name).write_bytes(b"half")
    with run.locked():
        assert names(run) == {RECIPE, ".lock", *mine}


def test_a_folder_with_files_of_others_is_not_made_a_run(tmp_path: Path) -> None:
    (tmp_path / "final.pt").write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds files that ddq did not write"):
        Run.create(tmp_path, "name")
    assert {path.name for path in tmp_path.iterdir()} == {"final.pt"}


def test_a_folder_that_ddq_did_not_make_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text("{}")
    with pytest.raises(UsageError, match="was not made by ddq"):
        lock(Run(tmp_path))
    Run(tmp_path).remove_if_untrained()
    assert {path.name for path in tmp_path.iterdir()} == {RECIPE}


def lock(run: Run) -> None:
    with run.locked():
        pass


WRITES: dict[str, Callable[[Run], None]] = {
    ".lock": lock,
    METRICS: lambda run: run.append_metrics(Metrics(1)),
    RECIPE: lambda run: run.write_recipe(Recipe()),
    LAST: lambda run: run.save(LAST, {}),
}


@pytest.mark.parametrize(("name", "write"), WRITES.items(), ids=WRITES)
def test_links_in_a_run_folder_are_not_followed(
    run: Run, tmp_path: Path, name: str, write: Callable[[Run], None]
) -> None:
    (tmp_path / "outside").write_text("mine")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="it is a link"):
        write(run)
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_run_folder_may_be_a_link_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.path)
    linked = Run(tmp_path / "link")
    with linked.locked():
        linked.append_metrics(Metrics(1))
    assert len(run.metrics()) == 1


def test_readers_hold_off_a_writer_but_no_other_reader(run: Run) -> None:
    with run.held(), run.held():  # nothing to lock yet
        pass
    with run.locked(), pytest.raises(UsageError, match="Another process"), run.held():
        pass
    with run.held(), run.held(), pytest.raises(UsageError, match="Another"), run.locked():
        pass


@pytest.mark.parametrize("name", ["n" * 255, "模" * 255])
def test_a_long_name_is_shortened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Run.create(None, name).path.name.endswith(name[:40])


def test_an_error_under_the_lock_is_passed_on(run: Run) -> None:
    with pytest.raises(FileNotFoundError), run.locked():
        raise FileNotFoundError("data")
