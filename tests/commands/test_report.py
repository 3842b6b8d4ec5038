"""`ddq report`: the same report in every format, and limits with the excess over each."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from made_run import make_course, make_report
from tiny_project import ddq

from ddqcli.commands.report import Limits
from ddqcli.runs.report import Accuracy, Report
from ddqcli.runs.run import Run

RUN = "runs/done"
ACCURACY = Accuracy(float=90.0, quantized=88.5, drop=1.5)


def test_the_newest_run_is_reported_where_none_is_named(finished: Path) -> None:
    assert ddq("report").out == ddq("report", RUN).out


def test_the_table_shows_every_tensor_and_the_totals(finished: Path) -> None:
    data, text = ddq("report", "--json").data, ddq("report").out
    for layer in data["layers"]:
        assert re.search(
            rf"^{re.escape(layer['name'])} .* "
            rf"{layer['bits']:g} +{layer['levels']} +{layer['bytes']:,} ",
            text,
            re.M,
        )
    totals = data["totals"]
    assert f"{totals['float_bytes']:,} -> {totals['bytes']:,} bytes" in text
    assert f"budget     {totals['budget_bytes']:,} bytes" in text


def test_sizes_add_up_to_what_the_budget_counts(finished: Path) -> None:
    data = ddq("report", "--json").data
    totals = data["totals"]
    assert sum(layer["bytes"] for layer in data["layers"]) == totals["quantized_bytes"]
    assert (
        totals["quantized_bytes"] + totals["kept_bytes"] + totals["manifest_bytes"]
        == totals["bytes"]
        <= totals["budget_bytes"]
    )
    assert 8 * totals["quantized_bytes"] / totals["weights"] == totals["average_bits"]


def test_csv_and_markdown_hold_the_same_rows_as_json(finished: Path) -> None:
    layers = ddq("report", "--json").data["layers"]
    rows = list(csv.DictReader(io.StringIO(ddq("report", "--csv").out)))
    assert [{**row, "shape": "x".join(map(str, row["shape"]))} for row in layers] == [
        {
            **row,
            **{
                key: json.loads(row[key])
                for key in ("bits", "levels", "bytes", "float_bytes", "error")
            },
        }
        for row in rows
    ]
    lines = ddq("report", "--md").out.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert lines[0] == "### ddq report"
    assert len(table) == 2 + len(layers) + 3  # what is not quantized, the manifest, the file
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("form", [[], ["--md"]])
def test_the_parts_of_a_file_add_up_to_it(
    finished: Path, exported_file: Path, form: list[str]
) -> None:
    texts = [ddq("report", source, *form).out for source in (RUN, exported_file)]
    report = Run(Path(RUN)).report()
    for text in texts:
        numbers = {}
        parts = ("not quantized", "manifest, header", "file")
        for name in (*(row.name for row in report.layers), *parts):
            (line,) = (
                line
                for line in text.splitlines()
                if re.match(rf"(\| )?{re.escape(name)} .*%", line)
            )
            nbytes, share = re.search(r"([\d,]+)[ |]+([\d.]+)%", line).groups()
            numbers[name] = int(nbytes.replace(",", "")), float(share)
        total, all_of_it = numbers.pop("file")
        assert (total, all_of_it) == (report.totals.bytes, 100)
        assert sum(nbytes for nbytes, _ in numbers.values()) == total
        assert all(abs(share - 100 * n / total) <= 0.05 for n, share in numbers.values())
    first, second = (
        [line for line in text.splitlines() if "%" in line and "weight" in line] for text in texts
    )
    assert first == second  # in the network's order


def test_warnings_are_shown_in_every_format(finished: Path) -> None:
    run = Run(Path(RUN))
    run.write_report(run.report().model_copy(update={"warnings": ("it went [wrong]",)}))
    assert "warning    it went [wrong]" in ddq("report").out
    assert "it went [wrong]" in ddq("report", "--md").out
    assert ddq("report", "--json").data["warnings"] == ["it went [wrong]"]
    assert ddq("export", "-o", "x.safetensors").code == 0
    assert ddq("report", "x.safetensors", "--json").data["warnings"] == ["it went [wrong]"]


def test_the_course_is_shown_in_every_format(finished: Path) -> None:
    run = Run(Path(RUN))
    run.write_report(run.report().model_copy(update={"course": make_course()}))
    lines = [
        "accuracy   float 92.50% -> quantized 85.00% -> compensated 90.50% -> trained 91.25%",
        "delivered  trained, best of 6 looks: step 80 (-1.25 points from float)",
    ]
    text, markdown = ddq("report").out.splitlines(), ddq("report", "--md").out
    start = text.index(lines[0])
    assert text[start : start + 2] == lines
    assert sum(line.startswith("accuracy ") for line in text) == 1
    for line in lines:
        assert line.split(maxsplit=1)[1] in markdown
    assert ddq("report", "--json").data["course"]["delivered"] == "trained"


# ---- limits


def a_report(accuracy: Accuracy | None = ACCURACY) -> Report:
    report = make_report()
    sizes = {"bytes": 1000, "float_bytes": 8000, "average_bits": 3.5}
    totals = report.totals.model_copy(update=sizes)
    return report.model_copy(update={"totals": totals, "accuracy": accuracy})


@pytest.mark.parametrize(
    ("limits", "unmet"),
    [
        (Limits(), []),
        (Limits(max_size="1kB", max_bits=3.5, max_drop=1.5, min_accuracy=88.5), []),
        (Limits(max_size="12.5%"), []),
        (
            Limits(max_size="999"),
            ["--max-size is unmet: 1,000 bytes are 1 above the limit of 999."],
        ),
        (
            Limits(max_size="10%"),
            ["--max-size is unmet: 1,000 bytes are 200 above the limit of 800."],
        ),
        (
            Limits(max_bits=3.25),
            ["--max-bits is unmet: 3.5 bits a weight are 0.25 above the limit of 3.25."],
        ),
        (Limits(max_drop=1), ["--max-drop is unmet: 1.5 points are 0.5 above the limit of 1."]),
        (
            Limits(min_accuracy=89),
            ["--min-accuracy is unmet: 88.5 % are 0.5 below the limit of 89."],
        ),
    ],
)
def test_a_limit_is_met_at_its_value_and_unmet_beyond(limits: Limits, unmet: list[str]) -> None:
    assert list(limits.unmet(a_report())) == unmet


def test_a_limit_of_an_accuracy_that_was_not_measured_is_unmet() -> None:
    unmet = Limits(max_drop=5, min_accuracy=1, max_size="1kB").unmet(a_report(accuracy=None))
    assert unmet == tuple(
        f"{flag} is unmet: nothing was evaluated in this run to hold against the limit."
        for flag in ("--max-drop", "--min-accuracy")
    )


def test_a_limit_that_is_no_number_is_never_met() -> None:
    nan = float("nan")
    assert len(Limits(max_bits=nan, max_drop=nan, min_accuracy=nan).unmet(a_report())) == 3


LIMITS = ["--max-size", "10%", "--max-bits", "1", "--max-drop=-100", "--min-accuracy", "101"]
FLAGS = ["--max-size", "--max-bits", "--max-drop", "--min-accuracy"]


@pytest.mark.parametrize("target", [RUN, "small.safetensors"])
def test_unmet_limits_are_exit_code_3_all_at_once_after_the_report(
    finished: Path, exported_file: Path, target: str
) -> None:
    shutil.copy(exported_file, "small.safetensors")
    plain, limited = ddq("report", target), ddq("report", target, *LIMITS)
    assert (plain.code, limited.code) == (0, 3)
    assert limited.out == plain.out
    errors = limited.err.removeprefix("Error: ").splitlines()
    assert [line.split(" is unmet: ")[0] for line in errors] == FLAGS


def test_unmet_limits_are_errors_in_the_envelope_beside_the_data(finished: Path) -> None:
    plain, limited = ddq("report", "--json"), ddq("report", "--json", *LIMITS)
    assert limited.code == 3
    assert limited.envelope["data"] == plain.data
    assert (limited.envelope["status"], limited.envelope["exit_code"]) == ("error", 3)
    assert [error.split(" is unmet: ")[0] for error in limited.envelope["errors"]] == FLAGS


def test_limits_that_are_met_change_nothing(finished: Path) -> None:
    met = ddq(
        "report",
        "--max-size",
        "100%",
        "--max-bits",
        "8",
        "--max-drop",
        "100",
        "--min-accuracy",
        "0",
    )
    assert met == ddq("report")
