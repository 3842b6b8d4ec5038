"""`ddq report --html`: what is on the page, for runs and files, with few layers and many; and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
from made_run import export_made, make_run
from tiny_project import ddq

from ddqcli.errors import DDQError
from ddqcli.inspection import history as course
from ddqcli.inspection.report import read_report
from ddqcli.inspection.report_page import write_page
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import Run

SECTIONS = [
    *(
        "Result",
        "Bits by layer",
        "Bits over time",
        "Loss",
        "Quantization error over time",
        "Levels over time",
    ),
    "Quantized tensors",
]


class Page(HTMLParser):
    """Headings, cells, paragraphs, number of pictures, and whatever would be loaded from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {"h1": [], "h2": [], "p": [], "td": [], "th": []}
        self.pictures, self.links, self.inside = 0, [], ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.pictures += tag == "figure"
        self.links += [
            value
            for name, value in attrs
            if name in {"src", "href"} and not (value or "").startswith("#")
        ]
        if tag in self.found:
            self.found[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.inside in self.found:
            self.found[self.inside][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("made") / "run", 9)


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_made(run, tmp_path_factory.mktemp("made") / "model.safetensors")


def page_of(target: Path, tmp_path: Path) -> Page:
    return Page(write_page(*read_report(target), tmp_path / "page.html"))


def test_the_page_of_a_run_has_all_sections_and_the_reports_numbers(
    run: Run, tmp_path: Path
) -> None:
    page = page_of(run.path, tmp_path)
    assert page.found["h1"] == ["ddq report: run"]
    assert page.found["h2"] == SECTIONS
    assert page.pictures == 4 + 6
    totals = run.report()["totals"]
    assert page.found["td"][:6] == [
        *(
            "bytes",
            f"{totals['float_bytes']:,}",
            f"{totals['bytes']:,}",
            "kept as they were",
            "",
            "32",
        ),
    ]
    assert page.found["td"][9:12] == ["accuracy", "92.50 %", "91.25 %"]
    for row in run.report()["layers"]:
        at = page.found["td"].index(row["name"])
        shown = page.found["td"][at : at + 9]
        assert shown[:5] == [
            row["name"], row["kind"], "×".join(map(str, row["shape"])), str(row["bits"]), str(row["levels"]),
        ]  # fmt: skip
        assert shown[6] == f"{row['bytes']:,}"
        assert shown[8] == f"{100 * row['error']:.2f}"
    text = " ".join(page.found["p"])
    assert "some/net.pt (net.py:build), 100 steps, seed 0" in text
    assert f"Budget: {totals['budget_bytes']:,} bytes" in text
    assert "Warning: levels that no weight takes." in text


def test_the_page_loads_nothing_and_follows_light_and_dark(run: Run, tmp_path: Path) -> None:
    page = page_of(run.path, tmp_path)
    assert page.links == []
    assert "://" not in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert "<script" not in page.text


def test_levels_are_shown_of_the_layers_with_the_largest_error(run: Run, tmp_path: Path) -> None:
    page = page_of(run.path, tmp_path)
    assert re.findall(r"Levels over time: ([\w.]+)", page.text) == [
        f"block{k}.conv.weight" for k in (9, 8, 7, 6, 5, 4)
    ]


def test_an_exported_file_has_what_it_can_have(file: Path, tmp_path: Path) -> None:
    page = page_of(file, tmp_path)
    assert page.found["h2"] == ["Result", "Bits by layer", "Quantized tensors"]
    assert page.pictures == 1
    assert page.found["td"].index("block2.conv.weight") < page.found["td"].index(
        "block9.conv.weight"
    )


@pytest.mark.parametrize(
    "lines", [None, "", '{"step": 10, "loss'], ids=["no file", "empty", "cut short"]
)
def test_a_run_without_metrics_has_no_course(tmp_path: Path, lines: str | None) -> None:
    made = make_run(tmp_path / "run")
    path = made.path / "metrics.jsonl"
    path.unlink() if lines is None else path.write_text(lines)
    assert page_of(made.path, tmp_path).found["h2"] == [
        "Result",
        "Bits by layer",
        "Quantized tensors",
    ]


@pytest.mark.parametrize(("entries", "each"), [(4000, 10), (585, 2), (400, 1)])
def test_long_runs_are_thinned_to_what_a_picture_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int, each: int
) -> None:
    made = make_run(tmp_path / "run", 1)
    line = next(entry for entry in made.metrics() if "loss" in entry)
    long = ({**line, "step": 10 * k, "loss": float(k)} for k in range(1, entries + 1))
    (made.path / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in long))
    drawn = {}
    for name in ("bits_over_time_figure", "loss_over_time_figure"):
        draw = getattr(course.plots, name)
        monkeypatch.setattr(
            course.plots,
            name,
            lambda *args, draw=draw, name=name: drawn.update({name: args}) or draw(*args),
        )
    page_of(made.path, tmp_path)
    steps, loss = drawn["loss_over_time_figure"][:2]
    means = [fmean(range(k + 1, min(k + each, entries) + 1)) for k in range(0, entries, each)]
    assert loss == pytest.approx(means)  # as smooth at the end as at the start
    assert steps == pytest.approx([10 * mean for mean in means])
    assert [drawn["bits_over_time_figure"][0][k] for k in (0, -1)] == [10, 10 * entries]
    assert len(drawn["bits_over_time_figure"][0]) == 400


@pytest.mark.parametrize(("count", "shown"), [("bytes", 3.0), ("eqn6", None)])
def test_a_target_is_drawn_if_it_counts_what_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str, shown: float | None
) -> None:
    made, targets = make_run(tmp_path / "run"), []
    recipe = Recipe.model_validate({"budget": {"target_bits": 3, "count": count}})
    monkeypatch.setattr(Run, "recipe", lambda self: recipe)
    draw = course.plots.bits_over_time_figure
    monkeypatch.setattr(
        course.plots, "bits_over_time_figure", lambda *args: targets.append(args[-1]) or draw(*args)
    )
    page_of(made.path, tmp_path)
    assert targets == [shown]


def test_a_run_with_levels_by_channel_has_no_levels_to_draw(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", axis=0).path, tmp_path)
    assert page.found["h2"] == [title for title in SECTIONS if title != "Levels over time"]


@pytest.mark.parametrize(
    ("given", "written"),
    [("a.html", "a.html"), ("a.htm", "a.htm"), ("new/deep", "new/deep/index.html"), ("there.html", "there.html/index.html"),
     ("sub/b.html", "sub/b.html")],
)  # fmt: skip
def test_a_file_or_a_folder_may_be_named(
    file: Path, tmp_path: Path, given: str, written: str
) -> None:
    (tmp_path / "there.html").mkdir()
    assert write_page(*read_report(file), tmp_path / given) == tmp_path / written
    assert (tmp_path / written).is_file()


def test_the_command_says_where_the_page_is(file: Path, tmp_path: Path) -> None:
    answer = ddq("report", file, "--html", tmp_path / "page.html")
    assert (answer.code, answer.out.splitlines()[-1]) == (0, f"page       {tmp_path / 'page.html'}")
    data = ddq("report", file, "--html", tmp_path / "page.html", "--json").data
    assert data["page"] == str(tmp_path / "page.html")
    assert ddq("report", file, "--html", tmp_path, "--max-size", "1kB").code == 3
    assert (tmp_path / "index.html").is_file()  # also where a gate is unmet


@pytest.mark.parametrize(
    "fault",
    [
        '{"step": 10, "loss": 1}',
        '{"step": 10, "levels": {}, "error": {}}',
        '{"step": 1, "levels": 2}',
    ],
)
def test_metrics_that_lack_something_are_refused(tmp_path: Path, fault: str) -> None:
    made = make_run(tmp_path / "run")
    (made.path / "metrics.jsonl").write_text(fault + "\n")
    with pytest.raises(DDQError, match=r"metrics\.jsonl is damaged"):
        page_of(made.path, tmp_path)


def test_a_page_that_cannot_be_written_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DDQError, match="taken"):
        write_page(*read_report(file), tmp_path / "taken" / "page.html")


def test_no_report_imports_torch(run: Run, file: Path, tmp_path: Path) -> None:
    for args in (
        [str(run.path), "--html", str(tmp_path)],
        [str(file), "--md"],
        ["--diff", str(run.path), str(file)],
    ):
        code = (
            f"import sys; sys.argv = ['ddq', 'report', *{args}]; from ddqcli.cli.app import main\n"
            "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
