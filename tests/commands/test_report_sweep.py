"""`report`, `inspect` and `export` of a sweep: its table, or one of its runs by `--target`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import make_run, make_sweep
from parsed_page import Page
from tiny_project import ddq

from ddqcli.runs.names import REPORT, SWEEP
from ddqcli.runs.run import Run


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/older"))
    return make_sweep(Path("runs/s"), 8, 4, 3)


def test_a_sweep_reports_its_table_and_curve(sweep: Run) -> None:
    """Made with 1000 bytes a bit, and a drop of 8 points by the number of bits."""
    lines = ddq("report", "runs/s").out.splitlines()
    float_bytes = sweep.sweep_table().float.bytes
    assert [line.split() for line in lines[1:5]] == [
        ["float", f"{float_bytes:,}", "92.50%"],
        *(
            [f"{k}", "bits", f"{k},000", f"{float_bytes / (1000 * k):.1f}x",
             f"{sweep.sweep_table().targets[0].average_bits:.3f}",
             f"{92.5 - 8 / k:.2f}%", f"{8 / k:.2f}", f"{k}-bits"]
            for k in (8, 4, 3)
        ),
    ]  # fmt: skip
    heights = {k: next(n for n, line in enumerate(lines) if f"o {k} bits" in line) for k in (8, 3)}
    assert heights[8] < heights[3]
    assert "runs       runs/s" in lines
    assert lines[-1] == "           ddq export runs/s --target 3"
    assert max(len(line) for line in lines if not line.startswith("warning")) <= 80


def test_the_newest_run_may_be_a_sweep(sweep: Run) -> None:
    data = ddq("report", "--json").data
    assert data == {"target": "runs/s", **sweep.sweep_table().model_dump(mode="json")}
    make_run(Path("runs/newer"))
    assert ddq("report", "--json").data["target"] == "runs/newer"


def test_its_table_is_csv_and_markdown_too(sweep: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(ddq("report", "runs/s", "--csv").out)))
    assert [(row["target"], row["bytes"], row["accuracy"]) for row in rows] == [
        *[("8 bits", "8000", "91.5"), ("4 bits", "4000", "90.5"), ("3 bits", "3000", "89.8333")]
    ]
    text = ddq("report", "runs/s", "--md").out
    assert "| 4 bits | 4,000 |" in text


@pytest.mark.parametrize("target", ["4", "4.0", "4 bits", "4-bits"])
def test_a_target_picks_a_run(sweep: Run, target: str) -> None:
    for source in ([], ["runs/s"]):
        data = ddq("report", *source, "--target", target, "--json").data
        assert (data["target"], data["totals"]["bytes"]) == ("runs/s/4-bits", 4000)


def test_inspect_takes_a_target(sweep: Run) -> None:
    data = ddq("inspect", "runs/s", "--target", "4", "--json", "-o", "pictures").data
    assert data["path"] == "runs/s/4-bits"


@pytest.mark.parametrize(
    "command",
    ["export", "export runs/s", "inspect runs/s", "report --max-drop 3",
     "report --diff runs/s runs/older"],
)  # fmt: skip
def test_what_needs_one_run_lists_the_targets(sweep: Run, command: str) -> None:
    answer = ddq(*command.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        "Error: runs/s holds several runs; name one, such as runs/s/8-bits, or pick it with "
        "--target: 8, 4, 3.\n"
    )


def test_the_page_of_a_sweep_is_written_and_named(sweep: Run) -> None:
    assert "page       a.html" in ddq("report", "runs/s", "--html", "a.html").out.splitlines()
    assert ddq("report", "--html", "a.html", "--json").data["page"] == "a.html"
    page = Page.read(Path("a.html"))
    assert page.all("h1") == ["ddq report: s"]
    assert page.all("td")[::6] == ["float", "8 bits", "4 bits", "3 bits"]
    assert len(page.svgs) == 1


def test_limits_hold_a_picked_run(sweep: Run) -> None:
    assert ddq("report", "--target", "4", "--max-drop", "2.5").code == 0
    assert ddq("report", "--target", "3", "--max-drop", "2.5").code == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("report --target 5", "runs/s holds no finished run of the target 5, but of: 8, 4, 3."),
        ("report runs/older --target 4", "runs/older is no sweep; omit --target."),
        ("report file --target 4", "file is no sweep; omit --target."),
        ("inspect file --target 4", "file is no sweep; omit --target."),
        ("export gone --target 4", "gone is no run folder; `ddq finetune` makes one under runs/."),
    ],
)
def test_other_targets_are_refused(sweep: Run, command: str, message: str) -> None:
    Path("file").touch()
    answer = ddq(*command.split())
    assert (answer.code, answer.err) == (2, f"Error: {message}\n")


def test_of_an_unfinished_sweep_the_finished_runs_can_be_picked(sweep: Run) -> None:
    (sweep.path / SWEEP).unlink()
    (sweep.path / "3-bits" / REPORT).unlink()
    assert ddq("report", "--json").data["target"] == "runs/s/4-bits"  # the newest that is finished
    assert ddq("report", "runs/s", "--target", "8").code == 0
    assert "--target: 8, 4." in ddq("report", "runs/s").err
    for name in ("8-bits", "4-bits"):
        (sweep.path / name / REPORT).unlink()
    answer = ddq("report", "runs/s")
    assert answer.err == (
        "Error: runs/s holds no finished run; `ddq finetune --resume --run-dir runs/s` goes on "
        "with it.\n"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{",
        lambda text: text.replace('"bytes": 4000', '"bytes": 4001'),
        lambda text: text.replace('"bytes": 4000', f'"bytes": -{10**40}'),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_table_is_named(sweep: Run, damage: Callable[[str], str]) -> None:
    text = (sweep.path / SWEEP).read_text()
    assert damage(text) != text
    (sweep.path / SWEEP).write_text(damage(text))
    answer = ddq("report")
    assert answer.code == 1
    assert answer.err.startswith("Error: runs/s/sweep.json is damaged; `ddq finetune --resume ")
