"""`ddq report --html`: the page of runs and of exported files, and the faults it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import export_made, make_run, make_sweep
from parsed_page import Page
from tiny_project import ddq

from ddqcli.errors import DDQError
from ddqcli.formatting import percent
from ddqcli.inspection.report import read_report
from ddqcli.inspection.report_page import write_report_page
from ddqcli.inspection.sweep_page import write_sweep_page
from ddqcli.runs.run import Run

SECTIONS = ["Quantized tensors", "Pictures", "Details", "Tensors that stay float"]
KINDS = {"Conv2d": "conv", "depthwise Conv2d": "depthwise", "Linear": "linear", "bias": "bias"}
CURVE = "Size against accuracy"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("made") / "run", 9)


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_made(run, tmp_path_factory.mktemp("made") / "model.safetensors")


def page_of(target: Path, tmp_path: Path) -> Page:
    return Page.read(write_report_page(*read_report(target), tmp_path / "page.html"))


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(run.path, tmp_path_factory.mktemp("page"))


def test_the_page_starts_with_the_figures_that_matter(run: Run, page: Page) -> None:
    totals = run.report().totals
    assert page.all("h1") == ["ddq report: run"]
    assert page.all("dt") == ["Size of the file", "Accuracy", "Average"]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in page.all("dd")] == [
        f"{totals.float_bytes / 1000:.1f} kB → {totals.bytes / 1000:.2f} kB",
        f"{totals.float_bytes / totals.bytes:.1f} times smaller; "
        f"{100 * totals.bytes / totals.budget_bytes:.1f} % of the budget",
        "92.50 % → 91.25 %",
        "float → quantized; -1.25 points",
        f"{totals.average_bits:.3f} bits a weight",
        "as stored, with levels and scales; inputs stay float",
    ]
    assert page.all("p")[:2] == [
        f"{run.path}: some/net.pt (net.py:build).",
        "Warning: levels that no weight takes.",
    ]
    assert page.places["dl"][0] < page.places["table"][0]


def test_every_layer_is_in_a_table_before_all_pictures_and_details(run: Run, page: Page) -> None:
    assert page.all("h2") == SECTIONS
    assert page.places["table"][0] < page.places["figure"][0] < page.places["h2"][2]
    for row in run.report().layers:
        shown = page.row_of(row.name, 9)
        shape = "×".join(map(str, row.shape))
        kind = KINDS[row.kind]
        assert shown[:5] == [row.name, kind, shape, str(row.bits), str(row.levels)]
        assert shown[6] == f"{row.bytes:,}"
        assert shown[8] == percent(row.error)


def test_the_details_hold_the_course_the_bytes_and_what_stays_float(run: Run, page: Page) -> None:
    totals = run.report().totals
    text = " ".join(page.all("p"))
    assert "Trained for 100 steps, seed 0" in text
    assert "float 92.50 % → quantized 85.00 % → compensated 90.50 % → trained 91.25 %." in text
    assert "Delivered: trained, best of 6 looks: step 80 (-1.25 points from float)." in text
    assert page.row_of("budget", 2)[1] == f"{totals.budget_bytes:,}"
    assert page.row_of("quantized model", 3) == ["quantized model", f"{totals.bytes:,}", "100.0"]
    assert page.row_of("of it: tensors that stay float", 2)[1] == "32"
    assert page.row_of("no layer's weight", 3) == ["no layer's weight", "1", "bn.weight"]


def test_every_picture_has_a_role_a_label_and_a_caption(page: Page) -> None:
    labels = [svg["aria-label"] for svg in page.svgs]
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(labels) == 4 + 5
    assert {svg["role"] for svg in page.svgs} == {"img"}
    assert all(page.all("figcaption"))
    assert [label.partition(":")[0] for label in labels] == [
        "Bits by layer",
        "Bits over time",
        "Loss over time",
        "Quantization error over time",
        *["Levels over time"] * 5,
    ]


def test_the_page_loads_nothing_and_follows_light_and_dark(page: Page) -> None:
    assert page.links == []
    assert "://" not in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert "<script" not in page.text


def test_levels_are_shown_of_the_layers_with_the_largest_error(page: Page) -> None:
    assert re.findall(r">Levels over time: ([\w.]+)<", page.text) == [
        f"block{k}.conv.weight" for k in (9, 8, 7, 6, 5)
    ]


def test_an_exported_file_has_what_it_can_have(file: Path, tmp_path: Path) -> None:
    page = page_of(file, tmp_path)
    assert page.all("h2") == SECTIONS
    assert len(page.svgs) == 1
    cells = page.all("td")
    assert cells.index("block2.conv.weight") < cells.index("block9.conv.weight")


# ---- sweeps


@pytest.fixture
def sweep(tmp_path: Path) -> Run:
    return make_sweep(tmp_path / "sweep", 8, 4, 2)


def test_a_run_of_a_sweep_shows_the_curve_before_the_layers(sweep: Run, tmp_path: Path) -> None:
    """Made with 1000 bytes a bit, and a drop of 8 points by the number of bits."""
    table = sweep.sweep_table()
    page = page_of(sweep.path / "4-bits", tmp_path)
    assert page.all("h2") == [CURVE, *SECTIONS]
    assert page.row_of("4 bits (this run)", 6)[1:] == [
        *("4,000", f"{table.float.bytes / 4000:.1f}x"),
        *(f"{table.targets[1].average_bits:.3f}", "90.50 %", "2.00"),
    ]
    assert page.svgs[0]["aria-label"] == CURVE
    assert {"8 bits", "4 bits", "2 bits", "this run", "float model"} <= set(page.all("text"))


def test_the_page_of_a_sweep_has_the_curve_and_every_target(sweep: Run, tmp_path: Path) -> None:
    page = Page.read(write_sweep_page(sweep.path, sweep.sweep_table(), tmp_path / "out"))
    assert page.all("h1") == ["ddq report: sweep"]
    assert page.all("h2") == [CURVE, "Warnings"]
    assert page.all("p")[0] == f"{sweep.path}: some/net.pt (net.py:build)."
    assert "Warning: 4 bits: levels that no weight takes." in page.all("p")
    assert page.all("td")[::6] == ["float", "8 bits", "4 bits", "2 bits"]
    assert "this run" not in page.text


@pytest.mark.parametrize("table", ["", '{"targets": 1}'])
def test_a_damaged_table_of_a_sweep_leaves_the_page_of_its_run(
    sweep: Run, tmp_path: Path, table: str
) -> None:
    (sweep.path / "sweep.json").write_text(table)
    assert page_of(sweep.path / "2-bits", tmp_path).all("h2") == SECTIONS


# ---- what a run may lack, and where the page goes


@pytest.mark.parametrize(
    "lines", [None, "", '{"step": 10, "loss'], ids=["no file", "empty", "cut short"]
)
def test_a_run_without_metrics_has_no_figures_over_time(tmp_path: Path, lines: str | None) -> None:
    made = make_run(tmp_path / "run")
    path = made.path / "metrics.jsonl"
    path.unlink() if lines is None else path.write_text(lines)
    page = page_of(made.path, tmp_path)
    assert page.all("h2") == SECTIONS
    assert len(page.svgs) == 1


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
