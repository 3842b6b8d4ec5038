"""The JSON keys of `ddq report`: frozen, and the same for a run and its exported file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_project import ddq, inside


@pytest.fixture(scope="module")
def reports(pristine: Path, exported_file: Path) -> list[dict]:
    with inside(pristine):
        return [ddq("report", target, "--json").data for target in ("runs/done", exported_file)]


def test_json_keys_are_these(reports: list[dict]) -> None:
    for data in reports:
        assert list(data) == [
            *(
                "target",
                "version",
                "layers",
                "totals",
                "metric",
                "accuracy",
                "other_metrics",
                "course",
                "activations",
                "kept_float",
                "source",
                "run",
                "warnings",
            )
        ]
        assert data["version"] == 1
        assert list(data["layers"][0]) == [
            "name",
            "kind",
            "shape",
            "bits",
            "levels",
            "bytes",
            "float_bytes",
            "error",
        ]
        assert list(data["totals"]) == [
            *(
                "bytes",
                "float_bytes",
                "budget_bytes",
                "average_bits",
                "quantized_bytes",
                "kept_bytes",
                "manifest_bytes",
                "weights",
            )
        ]
        assert data["metric"] == {"name": "accuracy", "unit": "%", "better": "higher"}
        assert list(data["accuracy"]) == ["float", "quantized", "drop"]
        assert list(data["activations"][0]) == ["name", "bits", "levels", "bytes"]
        assert list(data["source"]) == ["path", "sha256", "arch", "ddq"]
        assert list(data["run"]) == ["steps", "seed", "method"]


def test_a_file_reports_what_its_run_does(reports: list[dict]) -> None:
    run, file = ({key: value for key, value in data.items() if key != "target"} for data in reports)
    for of_run in run["layers"]:  # of which the file has three digits
        of_run["error"] = float(f"{of_run['error']:.3g}")
    assert (
        run.pop("kept_float").keys() == (kept := file.pop("kept_float")).keys()
    )  # why is a matter of the run
    assert set(kept.values()) == {"stored as float32", "a constant: takes no bytes"}
    assert run == file
