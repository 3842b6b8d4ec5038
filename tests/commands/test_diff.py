"""`ddq report --diff A B`: the values of both sides, missing ones, and every format."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from made_run import export_made, make_run
from rich.console import Console
from tiny_project import ddq

from ddqcli.commands.diff import DiffResult, diff, pair
from ddqcli.render.diff import as_csv, as_markdown, show, total_rows
from ddqcli.runs.report import Report
from ddqcli.runs.run import Run


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of three layers, and a run of four with other bits, inputs and accuracy."""
    folder = tmp_path_factory.mktemp("diff")
    b = make_run(folder / "b", 4)
    report = b.report().data()
    report["layers"][1].update(bits=5, levels=30, bytes=999, error=0.001)
    report["totals"] |= {"bytes": 2000, "budget_bytes": None, "average_bits": 4.1}
    report["accuracy"] = {"float": 92.5, "quantized": 90.0, "drop": 2.5}
    report["activations"] = [{"name": "block1.conv", "bits": 4, "levels": "learned", "bytes": 22}]
    b.write_report(Report.model_validate(report))
    return export_made(make_run(folder / "a", 3), folder / "a.safetensors"), b.path


@pytest.fixture(scope="module")
def result(sides: tuple[Path, Path]) -> DiffResult:
    return diff(*sides)


def shown(result: DiffResult, width: int) -> str:
    stream = io.StringIO()
    show(result, Console(file=stream, width=width))
    return stream.getvalue()


def test_each_layer_has_both_sides_values(result: DiffResult, sides: tuple[Path, Path]) -> None:
    b = {row.name: row for row in Run.open(sides[1]).report().layers}
    assert [row["name"] for row in result.layers] == [
        *(f"block{k}.conv.weight" for k in (1, 2, 3)), "fc.bias", "block4.conv.weight",
    ]  # fmt: skip
    for row in result.layers:
        for column in ("bits", "levels", "bytes", "error"):
            assert row[column]["b"] == getattr(b[row["name"]], column)
    changed = result.layers[1]
    assert changed["bits"] == {"a": 3, "b": 5, "change": 2}
    assert changed["error"] == {"a": 0.02, "b": 0.001, "change": -0.019}
    assert (changed["kind"], changed["shape"]) == ("depthwise Conv2d", [6, 5, 3, 3])
    only_b = result.layers[4]
    assert only_b["bytes"] == {"a": None, "b": b["block4.conv.weight"].bytes, "change": None}


def test_totals_and_accuracy_have_both_sides_values(result: DiffResult) -> None:
    assert result.totals["bytes"]["b"] == 2000
    assert result.totals["bytes"]["change"] == 2000 - result.totals["bytes"]["a"]
    assert result.totals["budget_bytes"]["change"] is None
    assert result.accuracy["quantized"] == {"a": 91.25, "b": 90.0, "change": -1.25}
    assert result.accuracy["drop"]["change"] == 1.25
    assert result.activations == (
        {"name": "block1.conv", "bits": {"a": None, "b": 4, "change": None}},
    )


def test_two_of_the_same_do_not_differ(sides: tuple[Path, Path]) -> None:
    same = diff(sides[1], sides[1])
    pairs = [*same.totals.values(), *same.accuracy.values(), *(row["error"] for row in same.layers)]
    assert {p["change"] for p in pairs} <= {0, None}


def test_a_change_is_free_of_the_noise_of_binary_fractions() -> None:
    assert pair(0.1, 0.3)["change"] == 0.2
    assert pair(4.0, 4)["change"] == 0
    assert pair(3, None) == {"a": 3, "b": None, "change": None}


def test_json_keys_are_these(result: DiffResult) -> None:
    data = json.loads(json.dumps(result.data()))
    assert list(data) == [
        *("version", "a", "b", "totals", "metric", "accuracy", "layers", "activations")
    ]
    assert data["version"] == 1
    assert list(data["totals"]) == [
        *("bytes", "float_bytes", "budget_bytes", "average_bits"),
        *("quantized_bytes", "kept_bytes", "manifest_bytes"),
    ]
    assert list(data["accuracy"]) == ["float", "quantized", "drop"]
    assert list(data["layers"][0]) == ["name", "kind", "shape", "bits", "levels", "bytes", "error"]
    assert list(data["activations"][0]) == ["name", "bits"]
    assert all(list(pair) == ["a", "b", "change"] for pair in data["totals"].values())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits(result: DiffResult, width: int) -> None:
    text = shown(result, width)
    table = [line for line in text.splitlines()[3:]]
    assert max(map(len, table)) <= width
    row = next(line.split() for line in table if "block2" in line)
    assert row == [
        "block2.conv.weight",
        "3",
        "5",
        *(["8", "30"] if width >= 100 else []),
        *row[-4:-2],
        "2.0%",
        "0.10%",
    ]
    assert row[-3] == "999"


def test_what_one_side_lacks_is_a_dash(result: DiffResult) -> None:
    row = next(line.split() for line in shown(result, 80).splitlines() if "block4" in line)
    assert row[1::2] == ["-", "-", "-"]
    totals = {name: rest for name, *rest in total_rows(result)}
    assert totals["budget, bytes"][1:] == ["-", ""]
    assert totals["inputs' bits"] == ["float", "4", ""]
    assert totals["accuracy"] == ["91.25%", "90.00%", "-1.25"]
    assert totals["bytes"][2].startswith("+")
    assert totals["float accuracy"][2] == "0.00"


def test_csv_is_unformatted(result: DiffResult) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert rows[1] == {
        "name": "block2.conv.weight",
        "kind": "depthwise Conv2d",
        "shape": "6x5x3x3",
        "bits_a": "3",
        "bits_b": "5",
        "levels_a": "8",
        "levels_b": "30",
        "bytes_a": str(result.layers[1]["bytes"]["a"]),
        "bytes_b": "999",
        "error_a": "0.02",
        "error_b": "0.001",
    }
    assert (rows[4]["bits_a"], rows[4]["bits_b"]) == ("", "2")


def test_markdown_holds_both_tables(result: DiffResult) -> None:
    lines = as_markdown(result).splitlines()
    assert lines[0] == "### ddq report"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(total_rows(result)) + 2 + len(result.layers)
    assert len({line.count("|") for line in rows[-len(result.layers) :]}) == 1
    assert "| accuracy | 91.25% | 90.00% | -1.25 |" in rows


def test_the_command_gives_every_form(sides: tuple[Path, Path], result: DiffResult) -> None:
    answer = ddq("report", "--diff", *sides, "--json")
    assert (answer.code, answer.data) == (0, json.loads(json.dumps(result.data())))
    assert ddq("report", "--diff", *sides, "--csv").out == as_csv(result) + "\n"
    assert ddq("report", "--diff", *sides, "--md").out == as_markdown(result) + "\n"
    assert ddq("report", "--diff", *sides).out.startswith(f"A  {sides[0]}\nB  {sides[1]}\n")


@pytest.mark.parametrize("more", [["runs/x"], ["--html", "x.html"], ["--max-drop", "1"]])
def test_what_does_not_go_with_it_is_refused(sides: tuple[Path, Path], more: list[str]) -> None:
    answer = ddq("report", "--diff", *sides, *more)
    assert answer.code == 2
    assert "--diff compares A and B" in answer.err


def test_a_side_that_is_no_report_is_named(sides: tuple[Path, Path], tmp_path: Path) -> None:
    answer = ddq("report", "--diff", sides[0], tmp_path / "gone")
    assert answer.code == 2
    assert "gone" in answer.err
