"""`ddq report --html`: the page of runs and of exported files, and the faults it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_run import export_made, make_run
from tiny_project import ddq

from ddqcli.errors import DDQError
from ddqcli.inspection.report import read_report
from ddqcli.inspection.report_page import write_report_page
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
    """Headings, cells, paragraphs, number of pictures, and links that would be loaded."""

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
    return Page(write_report_page(*read_report(target), tmp_path / "page.html"))


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(run.path, tmp_path_factory.mktemp("page"))


def test_the_page_of_a_run_has_all_sections_and_the_reports_numbers(run: Run, page: Page) -> None:
    assert page.found["h1"] == ["ddq report: run"]
    assert page.found["h2"] == SECTIONS
    assert page.pictures == 4 + 6
    totals = run.report().totals
    assert page.found["td"][:6] == [
        *(
            "bytes",
            f"{totals.float_bytes:,}",
            f"{totals.bytes:,}",
            "not quantized",
            "",
            "32",
        ),
    ]
    assert page.found["td"][12:15] == ["accuracy", "92.50 %", "91.25 %"]
    for row in run.report().layers:
        start = page.found["td"].index(row.name)
        shown = page.found["td"][start : start + 9]
        shape = "×".join(map(str, row.shape))
        assert shown[:5] == [row.name, row.kind, shape, str(row.bits), str(row.levels)]
        assert shown[6] == f"{row.bytes:,}"
        assert shown[8] == f"{100 * row.error:.2f}"
    text = " ".join(page.found["p"])
    assert "some/net.pt (net.py:build), 100 steps, seed 0" in text
    assert f"Budget: {totals.budget_bytes:,} bytes" in text
    assert "float 92.50 % → quantized 85.00 % → compensated 90.50 % → trained 91.25 %." in text
    assert "Delivered: trained, best of 6 looks: step 80 (-1.25 points from float)." in text
    assert "Warning: levels that no weight takes." in text


def test_the_page_loads_nothing_and_follows_light_and_dark(page: Page) -> None:
    assert page.links == []
    assert "://" not in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert "<script" not in page.text


def test_levels_are_shown_of_the_layers_with_the_largest_error(page: Page) -> None:
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
def test_a_run_without_metrics_has_no_figures_over_time(tmp_path: Path, lines: str | None) -> None:
    made = make_run(tmp_path / "run")
    path = made.path / "metrics.jsonl"
    path.unlink() if lines is None else path.write_text(lines)
    assert page_of(made.path, tmp_path).found["h2"] == [
        "Result",
        "Bits by layer",
        "Quantized tensors",
    ]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("a.html", "a.html"),
        ("a.htm", "a.htm"),
        ("new/deep", "new/deep/index.html"),
        ("there.html", "there.html/index.html"),
        ("sub/b.html", "sub/b.html"),
    ],
)
def test_a_file_or_a_folder_may_be_named(
    file: Path, tmp_path: Path, given: str, written: str
) -> None:
    (tmp_path / "there.html").mkdir()
    assert write_report_page(*read_report(file), tmp_path / given) == tmp_path / written
    assert (tmp_path / written).is_file()


def test_the_command_says_where_the_page_is(file: Path, tmp_path: Path) -> None:
    answer = ddq("report", file, "--html", tmp_path / "page.html")
    assert (answer.code, answer.out.splitlines()[-1]) == (0, f"page       {tmp_path / 'page.html'}")
    data = ddq("report", file, "--html", tmp_path / "page.html", "--json").data
    assert data["page"] == str(tmp_path / "page.html")
    assert ddq("report", file, "--html", tmp_path, "--max-size", "1kB").code == 3
    assert (tmp_path / "index.html").is_file()  # also if a limit is exceeded


def test_a_page_that_cannot_be_written_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DDQError, match="taken"):
        write_report_page(*read_report(file), tmp_path / "taken" / "page.html")


def test_no_report_imports_torch(file: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1).path
    code = f"""
import sys
from ddqcli.cli.app import main
for args in (["{run}", "--html", "{tmp_path}"], ["{file}", "--md"], ["--diff", "{run}", "{file}"]):
    sys.argv = ["ddq", "report", *args]
    try:
        main()
    except SystemExit as end:
        assert not end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
