"""Small files eat no memory and no time, and pipes never hang a reader."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bombs import manifest, memo, npz_claim, overlapping, strided, strided_in_final
from tiny_project import RECIPE, ddq, exit_code, folder_of_images

from ddqcli.checkpoint.torch_zip import load_structure
from ddqcli.data.image_folder import open_folder
from ddqcli.errors import RecipeError
from ddqcli.recipe.yaml_text import parse_sections

GIGABYTE = 1 << 30

BOMBS: dict[str, tuple[Callable[[Path], None], str, str, int]] = {
    "strides, inspected": (strided, "bomb.pt", "inspect bomb.pt", 2),
    "strides, finetuned": (strided, "bomb.pt", "finetune bomb.pt", 2),
    "strides in a run": (strided_in_final, "runs/done/final.pt", "export", 1),
    "a memo, inspected": (memo, "bomb.pt", "inspect bomb.pt", 0),
    "a manifest, reported": (manifest, "bomb.safetensors", "report bomb.safetensors", 4),
    "a manifest, checked": (manifest, "bomb.safetensors", "export --check bomb.safetensors", 4),
    "records that overlap": (overlapping, "bomb.pt", "inspect bomb.pt", 2),
    "an array's header": (npz_claim, "bomb.npz", "finetune model.pt --data bomb.npz", 2),
}


@pytest.mark.parametrize(("make", "name", "command", "code"), BOMBS.values(), ids=BOMBS)
def test_a_small_file_takes_little_memory(
    finished: Path, make: Callable[[Path], None], name: str, command: str, code: int
) -> None:
    make(Path(name))
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = ddq(*command.split())
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        Path("child.txt").write_text(f"{answer.err} {grown:,} bytes")
        os._exit(answer.code if grown < GIGABYTE // 2 and "--debug" not in answer.err else 99)
    assert exit_code(child) == code, Path("child.txt").read_text()


def test_a_pickle_with_a_far_memo_is_read_without_memory_for_it(tmp_path: Path) -> None:
    memo(tmp_path / "model.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(load_structure(tmp_path / "model.pt")) == ["w"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE // 4 // 1024


# ---- recipes


def test_many_keys_are_read_in_linear_time() -> None:
    def seconds(count: int) -> float:
        text = "".join(f"k{k}: 1\n" for k in range(count))
        start = time.process_time()
        assert len(parse_sections(text, "r")) == count
        return time.process_time() - start

    seconds(100)
    assert seconds(8000) < 60 * seconds(800), "ten times the keys in far less than 100 times"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: &a {x: 1}\nb: {<<: *a}\n", "<< merges have no use"),
        ("a: 1\nb: 2\na: 3\n", "a is given twice"),
    ],
)
def test_merges_and_duplicates_are_refused(text: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        parse_sections(text, "r")


def test_a_recipe_of_megabytes_is_refused_before_it_is_parsed(project: Path) -> None:
    Path("ddq.yaml").write_text(RECIPE + "# \n" * 200_000)
    answer = ddq("finetune", "model.pt")
    assert answer.code == 2
    assert "is it a recipe?" in answer.err


# ---- files of a run

GIANTS = {
    "report": "runs/done/report.json",
    "export": "runs/done/report.json",
    "inspect runs/done -o out": "runs/done/metrics.jsonl",
    "export runs/done": "runs/done/recipe.yaml",
}


@pytest.mark.parametrize(("command", "name"), GIANTS.items(), ids=GIANTS)
def test_a_file_of_a_run_that_claims_terabytes_is_one_sentence(
    finished: Path, command: str, name: str
) -> None:
    os.truncate(name, 1 << 40)  # it takes no place on the disk
    answer = ddq(*command.split())
    assert answer.code in (1, 2)
    assert name in answer.err
    assert "--debug" not in answer.err


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl", "recipe.yaml"])
def test_deep_nesting_in_a_file_of_a_run_is_one_sentence(finished: Path, name: str) -> None:
    Path("runs/done", name).write_text("[" * 100_000)
    answer = ddq("report", "--html", "out.html")
    assert answer.code in (0, 1, 2)
    assert "--debug" not in answer.err


# ---- pipes and links

PIPES = {
    "inspect {}": "pipe",
    "report {}": "pipe",
    "export --check {}": "pipe",
    "finetune {}": "pipe",
    "finetune --recipe {}": "pipe",
    "finetune --data {}": "pipe.npz",
    "finetune --arch {}:build": "pipe.py",
    "export runs/done --half": "runs/done/final.pt",
    "export": "runs/done/recipe.yaml",
    "report": "runs/done/report.json",
    "inspect runs/done": "runs/done/metrics.jsonl",
    "finetune --resume --run-dir runs/done": "runs/done/last.pt",
    "export runs/done": "runs/done/.ddq",
    "export -o x": "runs/done/.lock",
}


@pytest.mark.parametrize(("command", "name"), PIPES.items(), ids=PIPES)
def test_a_pipe_hangs_no_reader(finished: Path, command: str, name: str) -> None:
    Path(name).unlink(missing_ok=True)
    os.mkfifo(name)
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        signal.alarm(60)
        answer = ddq(*command.format(name).split())
        Path("child.txt").write_text(answer.err)
        os._exit(99 if "--debug" in answer.err else answer.code)
    assert exit_code(child) in (0, 1, 2, 4), Path("child.txt").read_text()


def test_links_between_folders_count_no_image_twice(project: Path) -> None:
    folder_of_images(Path("images"))
    plain = open_folder(Path("images"))
    for name in ("loop", "again"):
        Path("images/train/class0", name).symlink_to(Path("images/train/class0").resolve())
    os.mkfifo("images/train/class0/pipe.png")
    looped = open_folder(Path("images"))
    assert looped.train.samples == plain.train.samples
    Path("images/train/class0/linked.png").symlink_to(Path("images/train/class0/0.png").resolve())
    assert len(open_folder(Path("images")).train) == len(plain.train) + 1
