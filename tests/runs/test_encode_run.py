"""A run's file within a target in bytes: what it leaves out before it would be larger."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_run import make_run

from ddqcli.artifact.read import read_artifact
from ddqcli.qat.frozen import FrozenModel
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.encode_run import encode_run, with_file_size
from ddqcli.runs.report import Report
from ddqcli.runs.run import FINAL


def test_a_file_leaves_out_what_only_informs_before_it_exceeds_its_target(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    frozen = FrozenModel.from_state(run.load(FINAL))
    report = run.report().model_copy(update={"warnings": ("a warning about the run " * 9,)})
    recipe = Recipe.model_validate({"name": "made", "budget": {"target_size": "9kB"}})

    def within(limit: int) -> tuple[int, dict]:
        totals = report.totals.model_copy(update={"budget_bytes": limit})
        limited = report.model_copy(update={"totals": totals})
        raw, sizes = encode_run(frozen, limited, recipe, {})
        assert len(raw) == sizes.file
        path = tmp_path / "model.safetensors"
        path.write_bytes(raw)
        artifact = read_artifact(path)
        assert Report.from_artifact(artifact).layers == report.layers
        return len(raw), artifact.meta

    full, meta = within(10**6)
    assert meta["recipe"]["name"] == "made"
    short, meta = within(full - 9)
    assert short <= full - 9
    assert meta.keys() == {"report"}
    shortest, meta = within(short - 9)
    assert shortest <= short - 9
    assert (meta["report"]["warnings"], meta["report"]["course"]) == ([], None)
    assert meta["report"]["accuracy"]


@pytest.mark.parametrize("budget", [{"target_bits": 4}, {}])
def test_other_budgets_leave_nothing_out(budget: dict, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    totals = run.report().totals.model_copy(update={"budget_bytes": 1})
    report = run.report().model_copy(update={"totals": totals})
    recipe = Recipe.model_validate({"name": "made", "budget": budget})
    raw, _ = encode_run(FrozenModel.from_state(run.load(FINAL)), report, recipe, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert read_artifact(path).meta["recipe"]["name"] == "made"


def test_a_target_in_bits_has_a_budget_in_bytes_that_its_own_digits_fit(tmp_path: Path) -> None:
    """The file says how large it may be, and is longer for saying it."""
    run = make_run(tmp_path / "run", 3)
    frozen = FrozenModel.from_state(run.load(FINAL))
    recipe = Recipe.model_validate({"name": "made", "budget": {"target_bits": 4}})
    bytes_ = with_file_size(run.report().with_budget(10**6), frozen, recipe).totals.bytes
    for budget in (1_000, *range(bytes_ - 80, bytes_ + 10)):
        report = with_file_size(run.report().with_budget(budget), frozen, recipe)
        raw, _ = encode_run(frozen, report, recipe, {})
        assert len(raw) == report.totals.bytes <= report.totals.budget_bytes
