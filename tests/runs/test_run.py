"""The files of a run are read back; damage and changed conditions are noticed."""

from __future__ import annotations

import json

import pytest
import torch
from made_run import make_report
from run_files import Metrics, names

from ddqcli.errors import DDQError, UsageError
from ddqcli.recipe.file import load_recipes
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import FINAL, LAST, METRICS, RECIPE, REPORT, Run
from ddqcli.training.metrics import Look


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


def test_a_line_of_metrics_cut_short_is_skipped_and_later_steps_are_removed(
    run: Run,
) -> None:
    for step in (10, 20, 30):
        run.append_metrics(Metrics(step))
    with (run.path / METRICS).open("ab") as file:
        file.write(b'{"step": 40, "lo\xff')
    assert [entry["step"] for entry in run.metrics()] == [10, 20, 30]
    run.truncate_metrics(20)
    run.append_metrics(Metrics(30))
    lines = (run.path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "loss": 0.5} for step in (10, 20, 30)
    ]


def test_looks_are_told_from_steps_and_the_last_of_a_step_counts(run: Run) -> None:
    for loss in (0.5, 0.25):
        run.append_metrics(Look(10, loss, 97.5))
        run.append_metrics(Metrics(10))
    assert run.looks() == [{"step": 10, "held_out_loss": 0.25, "held_out_accuracy": 97.5}]
    assert len(run.metrics()) == 2
    assert run.snapshots() == []


def test_a_state_of_other_conditions_is_refused_and_they_are_named(run: Run) -> None:
    conditions = {"format": 2, "sha256": "a" * 64, "recipe": "train:\n  lr: 0.1\n", "steps": 10}
    assert run.load_resume_state(conditions) is None
    run.save(LAST, conditions)
    assert run.load_resume_state(conditions) == conditions
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
        (
            {"teacher": "c" * 64},
            "The teacher's checkpoint is not the one .SHA-256 cccccccccccc…, then None…. that",
        ),
        ({"steps": 9}, "The data are not the ones .9 steps, then 10. that"),
    ):
        with pytest.raises(UsageError, match=message):
            run.load_resume_state({**conditions, **changed})


def test_a_recipe_that_is_cut_anywhere_is_refused(run: Run) -> None:
    whole = (run.path / RECIPE).read_bytes()
    for size in (*range(0, len(whole), 5), len(whole) - 1):
        (run.path / RECIPE).write_bytes(whole[:size])
        with pytest.raises(UsageError):
            run.recipe()
    (run.path / RECIPE).write_bytes(whole)
    assert run.recipe() == Recipe()
