"""The run folder: each file whole or not at all, whatever the disk does, and one writer at a time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from made_run import make_report

from ddqcli.errors import DDQError, UsageError
from ddqcli.recipe.file import load_recipes
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import FINAL, LAST, METRICS, RECIPE, REPORT, Run


@dataclass(frozen=True)
class Metrics:
    step: int
    loss: float = 0.5


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run", "name")
    run.write_recipe(Recipe())
    return run


def names(run: Run) -> set[str]:
    return {path.name for path in run.path.iterdir()}


# ---- folders


def test_a_folder_is_named_after_time_and_model_and_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260131-142310")
    made = [Run.create(None, "a/../b c").path for _ in range(3)]
    assert [path.name for path in made] == [
        f"20260131-142310-a-..-b-c{end}" for end in ("", "-1", "-2")
    ]
    assert all(path.parent == Path("runs") and path.is_dir() for path in made)


def test_a_folder_that_holds_a_run_is_not_begun_again(run: Run) -> None:
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


def test_a_folder_in_which_nothing_was_trained_is_removed_but_no_file_of_the_user(run: Run) -> None:
    (run.path / "notes.txt").write_text("mine")
    run.discard_if_empty()
    assert names(run) == {"notes.txt"}
    (run.path / "notes.txt").unlink()
    run.discard_if_empty()
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


def test_what_a_killed_process_half_wrote_is_cleaned_up(run: Run) -> None:
    (run.path / f".{LAST}.4242.tmp").write_bytes(b"half")
    with run.locked():
        assert names(run) == {RECIPE, ".lock"}


def test_an_error_inside_is_not_taken_for_one_of_the_folder(run: Run) -> None:
    with pytest.raises(FileNotFoundError), run.locked():
        raise FileNotFoundError("data")


# ---- files


def test_what_is_written_is_read_back(run: Run) -> None:
    run.save(FINAL, {"x": torch.arange(3), "y": [1, None]})
    report = make_report().model_copy(update={"kept_float": {"é": "a buffer"}, "accuracy": None})
    run.write_report(report)
    assert run.load(FINAL)["x"].tolist() == [0, 1, 2]
    assert run.report() == report
    assert [run.recipe()] == load_recipes(run.path / RECIPE) == [Recipe()]
    assert names(run) == {RECIPE, FINAL, REPORT}


def test_every_flipped_bit_of_a_state_or_a_report_is_noticed(run: Run) -> None:
    run.save(LAST, {"x": torch.arange(64.0), "step": 7})
    run.write_report(make_report())
    whole = run.load(LAST)
    for name, read in ((LAST, lambda: run.load(LAST)), (REPORT, run.report)):
        content = (run.path / name).read_bytes()
        for at in range(0, len(content), 13 if name == LAST else 1):
            (run.path / name).write_bytes(
                content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
            )
            try:
                seen = read()
            except DDQError:
                continue
            assert name == LAST  # the bit was one of padding, or of a zip's dates
            assert seen["step"] == whole["step"]
            assert torch.equal(seen["x"], whole["x"])
        (run.path / name).write_bytes(content)


def test_metrics_outlive_a_line_that_was_cut_short_and_are_cut_where_a_run_resumes(
    run: Run,
) -> None:
    for step in (10, 20, 30):
        run.add_metrics(Metrics(step))
    with (run.path / METRICS).open("ab") as file:
        file.write(b'{"step": 40, "lo\xff')
    assert [entry["step"] for entry in run.metrics()] == [10, 20, 30]
    run.cut_metrics(20)
    run.add_metrics(Metrics(30))
    lines = (run.path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "loss": 0.5} for step in (10, 20, 30)
    ]


def test_a_state_of_other_facts_is_refused_saying_which(run: Run) -> None:
    facts = {"format": 2, "sha256": "a" * 64, "recipe": "train:\n  lr: 0.1\n", "steps": 10}
    assert run.saved(facts) is None
    run.save(LAST, facts)
    assert run.saved(facts) == facts
    for changed, message in (
        (
            {"sha256": "b" * 64},
            "The checkpoint is not the one .SHA-256 bbbbbbbbbbbb…, then aaaaaaaaaaaa…. that",
        ),
        ({"recipe": "train:\n  lr: 0.2\n"}, "is not the recipe .lr: 0.1, now lr: 0.2. that"),
        (
            {"format": 3},
            "This version of ddq is not the one .training states of format 3, then 2. that",
        ),
        ({"steps": 9}, "The data are not the ones .9 steps, then 10. that"),
    ):
        with pytest.raises(UsageError, match=message):
            run.saved({**facts, **changed})


# ---- disks that refuse


def test_a_write_that_fails_leaves_the_previous_file_and_nothing_beside(run: Run) -> None:
    run.save(LAST, {"step": 1})

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        DDQError,
        match=r"last\.pt cannot be written: No space left on device; what was there before is kept",
    ):
        write_atomic(run.path / LAST, fail)
    assert run.load(LAST) == {"step": 1}
    assert names(run) == {RECIPE, LAST}


@pytest.fixture(params=["file size limit", "full disk"])
def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in which files of 1 MB cannot be written."""
    if request.param == "file size limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        yield tmp_path
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the file size limit stands in for it")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_and_the_last_good_state_survives(narrow: Path) -> None:
    run = Run.create(narrow / "run", "name")
    good = {"x": torch.ones(10_000)}
    run.save(LAST, good)
    with pytest.raises(
        DDQError, match=r"last\.pt cannot be written: .*; what was there before is kept"
    ) as caught:
        run.save(LAST, {"x": torch.ones(250_000)})
    assert "\n" not in str(caught.value)
    assert torch.equal(run.load(LAST)["x"], good["x"])
    assert names(run) == {LAST}


def test_a_folder_that_vanished_is_one_sentence(run: Run) -> None:
    (run.path / RECIPE).unlink()
    run.path.rmdir()
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        run.write_report(make_report())
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        run.add_metrics(Metrics(1))
