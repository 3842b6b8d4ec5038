"""The typed report: what is written is read, and what a file embeds gives the report again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_run import export_made, make_course, make_report, make_run
from pydantic import ValidationError

from ddqcli.artifact.read import read_artifact
from ddqcli.errors import VerificationError
from ddqcli.inspection.report import read_report
from ddqcli.runs.report import (
    Accuracy,
    ActivationRow,
    FloatModel,
    Report,
    SweepRow,
    SweepTable,
    TensorRow,
)

KEYS = (
    *("version", "layers", "totals", "metric", "accuracy", "other_metrics", "course"),
    *("activations", "kept_float", "source", "run", "warnings"),
)


def test_a_report_is_the_same_after_json() -> None:
    report = make_report()
    assert tuple(report.data()) == KEYS
    assert Report.model_validate(json.loads(json.dumps(report.data()))) == report


def test_integers_stay_integers_and_floats_floats() -> None:
    same = TensorRow.of("a", "Linear", (4, 2), [3, 3], [8, 8], 0.0)
    mixed = TensorRow.of("a", "Linear", (4, 2), [3, 4], [8, 16], 0.0)
    even = TensorRow.of("a", "Linear", (4, 2), [3, 5], [8, 16], 0.0)
    for row, bits in ((same, "3"), (mixed, "3.5"), (even, "4.0")):
        again = TensorRow.model_validate(json.loads(json.dumps(row.data())))
        assert json.dumps(row.bits) == json.dumps(again.bits) == bits


def test_a_row_counts_bytes_by_group() -> None:
    row = TensorRow.of("a", "Linear", (4, 3), [3, 8, 1, 2], [7, 256, 2, 4], 0.5, element_size=8)
    assert row.bytes == (3 * (3 + 8 + 1 + 2) + 7) // 8 + (8 + 2 + 4) + 4 * 6
    assert (row.levels, row.float_bytes, row.bits) == (256, 12 * 8, 3.5)
    assert ActivationRow.of("a", 4, learned=True).bytes == 16 + 6


def test_a_missing_or_unknown_key_is_refused() -> None:
    data = make_report().data()
    for changed in ({**data, "more": 1}, {k: v for k, v in data.items() if k != "run"}):
        with pytest.raises(ValidationError):
            Report.model_validate(changed)


@pytest.mark.parametrize("axis", [None, 0])
def test_an_exported_file_gives_the_report_of_its_run(tmp_path: Path, axis: int | None) -> None:
    run = make_run(tmp_path / "run", 3, axis=axis)
    report = run.report()
    again = Report.from_artifact(read_artifact(export_made(run, tmp_path / "model.safetensors")))
    assert again.layers == report.layers
    assert again.source == report.source.model_copy(update={"path": "net.pt"})
    assert again.kept_float == {"bn.weight": "stored as float32"}
    same = ("metric", "accuracy", "course", "run", "warnings", "activations")
    assert [getattr(again, key) for key in same] == [getattr(report, key) for key in same]
    average = again.totals.average_bits
    assert average == pytest.approx(report.totals.average_bits, abs=1e-4)
    of_file = report.with_manifest(again.totals.manifest_bytes).totals
    assert again.totals.model_copy(update={"average_bits": 0.0}) == of_file.model_copy(
        update={"average_bits": 0.0}
    )
    assert again.totals.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert again.embedded() == report.embedded()


def test_a_file_of_a_version_without_courses_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    artifact = read_artifact(export_made(run, tmp_path / "model.safetensors"))
    del artifact.meta["report"]["course"]
    assert Report.from_artifact(artifact).course is None


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("kind", [3, "Linear"], "report.kind.0: input should be a valid string"),
        ("run", {"steps": 1}, "report.run.seed: field required"),
        ("budget_bytes", "x", "report.budget_bytes: input should be a valid integer"),
        ("budget_bytes", 0, "report.budget_bytes: input should be greater than or equal to 1"),
        ("more", 1, "report.more: extra inputs are not permitted"),
        ("error", [], "carries the report of another file"),
    ],
)
def test_a_forged_report_is_refused_and_its_key_named(
    tmp_path: Path, key: str, value: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = make_run(tmp_path / "run", 1), tmp_path / "model.safetensors"
    embedded = run.report().embedded() | {key: value}
    monkeypatch.setattr(Report, "embedded", lambda self: embedded)
    export_made(run, path)
    with pytest.raises(VerificationError, match=fault):
        read_report(path)


def test_no_record_holds_a_number_that_json_has_not() -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(ValidationError, match="Input should be a finite number"):
            FloatModel(bytes=1, accuracy=value)


@pytest.mark.parametrize(
    ("changes", "steps", "outcome"),
    [
        ({}, 100, "trained, best of 6 looks: step 80 (-1.25 points from float)"),
        ({"looks": 0}, 1, "trained, step 80 (-1.25 points from float)"),
        (
            {"delivered": "quantized", "best_step": 0},
            100,
            "quantized start (-7.50 points from float); training did not improve it",
        ),
        (
            {"delivered": "compensated", "best_step": 0},
            0,
            "compensated start, not trained (-2.00 points from float)",
        ),
    ],
)
def test_the_outcome_names_the_delivered_state(
    changes: dict[str, Any], steps: int, outcome: str
) -> None:
    assert make_course(**changes).outcome(steps) == outcome


def test_a_course_without_the_delivered_stage_is_refused() -> None:
    stages = [{"name": "float", "accuracy": 92.5}, {"name": "quantized", "accuracy": 85.0}]
    assert make_course(stages=stages, delivered="quantized").start == 85
    with pytest.raises(ValidationError, match="not among the stages"):
        make_course(stages=stages)


def test_accuracies_are_rounded_to_four_digits() -> None:
    assert Accuracy.of(91.00004, 90.123456).data() == {
        "float": 91.0,
        "quantized": 90.1235,
        "drop": 0.8766,
    }


@pytest.mark.parametrize("measured", [True, False])
def test_a_sweep_takes_its_rows_from_reports(measured: bool) -> None:
    report = make_report()
    if not measured:
        report = report.model_copy(update={"accuracy": None, "course": None})
    row = SweepRow.of("4 bits", report, "4-bits" if measured else None)
    table = SweepTable.of(report, [row])
    assert SweepTable.model_validate(json.loads(json.dumps(table.data()))) == table
    assert row.bytes == report.totals.bytes
    expected = (91.25, 90.5, 1.25) if measured else (None, None, None)
    assert (row.accuracy, row.start, row.drop) == expected
    assert table.float.accuracy == (92.5 if measured else None)
