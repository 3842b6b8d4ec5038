"""No command replaces what is not its own: inputs, a run's files, links, pipes, others' folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_project import ddq, exit_code, in_child

from ddqcli.runs.run import Run

RUN = Path("runs/done")
INPUTS = ["model.pt", "net.py", "images.npz", "hard.pt", "./runs/../model.pt"]
OWN = ["final.pt", "last.pt", "recipe.yaml", "report.json", "metrics.jsonl", ".ddq", ".lock"]


def content() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", [*INPUTS, *(f"runs/done/{name}" for name in OWN)])
def test_an_export_replaces_no_input_and_no_file_of_the_run(finished: Path, out: str) -> None:
    os.link("model.pt", "hard.pt")
    before = content()
    answer = ddq("export", "-o", out)
    assert answer.code == 2
    assert "it belongs to what this command reads" in answer.err
    assert content() == before


@pytest.mark.parametrize(
    "command",
    ["export -o out", "export -o out.onnx --format onnx", "report --html out.html"],
)
def test_a_link_or_a_pipe_is_not_replaced(finished: Path, command: str) -> None:
    out = Path(next(word for word in command.split() if word.startswith("out")))
    if out.suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    out.symlink_to("model.pt")
    before = content()
    assert ddq(*command.split()).code == 2
    assert out.is_symlink()
    out.unlink()
    del before[str(out)]
    os.mkfifo(out)
    assert ddq(*command.split()).code == 2
    assert out.is_fifo()
    assert content() == before


def test_an_earlier_export_is_replaced(finished: Path) -> None:
    for _ in range(2):
        assert ddq("export").code == 0
        assert ddq("export", "-o", "a.safetensors").code == 0
        assert ddq("report", "--html", "a.html").code == 0


@pytest.mark.parametrize("source", ["runs/done", "mine.safetensors"])
def test_a_report_replaces_no_page_of_another(
    finished: Path, exported_file: Path, source: str
) -> None:
    shutil.copy(exported_file, "mine.safetensors")
    Path("page.html").write_text("<!DOCTYPE html><title>mine</title>")
    Path("empty.html").touch()
    before = content()
    answer = ddq("report", source, "--html", "page.html")
    assert answer.code == 2
    assert "page.html cannot be written: the file there is no page of ddq's" in answer.err
    assert content() == before
    assert ddq("report", source, "--html", "empty.html").code == 0


def test_a_folder_that_holds_a_checkpoint_is_not_made_a_run(project: Path) -> None:
    shutil.copy("model.pt", "final.pt")
    before = content()
    answer = ddq("finetune", "final.pt", "--run-dir", ".")
    assert answer.code == 2
    assert "name a new or empty folder with --run-dir" in answer.err
    assert content() == before


@pytest.mark.parametrize("name", ["index.html", "overview-1.png", "notes", ".hidden"])
def test_pictures_go_into_no_folder_with_files_of_others(project: Path, name: str) -> None:
    Path("site").mkdir()
    Path("site", name).write_text("mine")
    before = content()
    answer = ddq("inspect", "model.pt", "-o", "site")
    assert answer.code == 2
    assert "name a new or empty folder with -o" in answer.err
    assert content() == before


def test_a_report_in_a_folder_replaces_only_a_report(finished: Path) -> None:
    for _ in range(2):
        assert ddq("report", "--html", ".").code == 0
    Path("index.html").write_text("mine")
    answer = ddq("report", "--html", ".")
    assert answer.code == 2
    assert "index.html is no page of ddq" in answer.err
    assert Path("index.html").read_text() == "mine"


def test_pictures_follow_no_link_out_of_their_folder(finished: Path) -> None:
    Path("elsewhere").mkdir()
    (RUN / "layers").symlink_to(Path("elsewhere").resolve())
    answer = ddq("inspect", RUN, "-o", RUN, "-q")
    assert answer.code == 2
    assert "layers is a link" in answer.err
    assert not list(Path("elsewhere").iterdir())


def test_pictures_replace_earlier_ones(finished: Path) -> None:
    Path("empty").mkdir()
    for model in ("model.pt", "runs/done"):
        assert ddq("inspect", model, "-o", "empty", "-q").code == 0
    assert "Levels of done" in Path("empty/index.html").read_text()


def test_an_empty_folder_may_become_a_run(project: Path) -> None:
    Path("empty").mkdir()
    assert ddq("finetune", "model.pt", "--run-dir", "empty", "--max-steps", "0").code == 0


def test_a_linked_run_folder_works(finished: Path) -> None:
    Path("link").symlink_to(RUN)
    assert ddq("export", "link", "--json").data["behaviour"]["outputs"] == 0
    assert ddq("report", "link").code == 0


@pytest.mark.parametrize(
    "command",
    ["export", "export --format c", "export --check made.safetensors", "export --check made.h"],
)
def test_no_export_reads_a_run_that_another_process_is_writing(
    finished: Path, command: str
) -> None:
    for name in ("made.safetensors", "made.h"):
        ending = ["--format", "c"] if name.endswith(".h") else []
        assert ddq("export", "-o", name, *ending).code == 0
    with Run(RUN).locked():
        answer = ddq(*command.split())
    assert (answer.code, "Another process is working in runs/done" in answer.err) == (2, True)


def test_exports_at_once_leave_one_whole_file(finished: Path) -> None:
    started = [in_child("export runs/done -o out.safetensors") for _ in range(2)]
    assert [exit_code(child) for child in started] == [0, 0], Path("child.txt").read_text()
    assert ddq("export", "--check", "out.safetensors").code == 0
    assert not list(Path().glob(".ddq-*"))
