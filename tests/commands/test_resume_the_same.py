"""Resume means the same run: other files, labels, images or networks are refused and named."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import NET, RECIPE, exit_code, folder_of_images, in_child, inside

from ddqcli.data import source_files
from ddqcli.data.source_files import fingerprint_of_files
from ddqcli.quant import cpu_launch

RUN = "finetune model.pt --run-dir run -q"
RESUME = "finetune --resume --run-dir run"
IMAGE = Path("images/train/class1/5.png")


def dying() -> None:
    """Kill this process at its fifth step."""
    from ddqcli.training.trainer import Trainer

    step, count = Trainer._train_step, iter(range(1000))

    def counting(*args: object) -> object:
        if next(count) == 5:
            signal.raise_signal(signal.SIGKILL)
        return step(*args)

    Trainer._train_step = counting


@pytest.fixture(scope="module")
def killed_once(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an image folder, a run in it that was killed at its fifth step, and state/."""
    folder = tmp_path_factory.mktemp("killed") / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    with inside(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        folder_of_images(Path("images"))
        recipe = RECIPE.replace("images.npz", "images/").replace("batch_size: 16", "batch_size: 4")
        Path("ddq.yaml").write_text(recipe)
        code = exit_code(in_child(RUN, before=dying))
        assert code == -signal.SIGKILL, Path("child.txt").read_text()
    return folder


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as working folder."""
    folder = shutil.copytree(killed_once, tmp_path / "project")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.chdir(folder)
    return folder


def resumed() -> tuple[int, str]:
    """Return exit code and messages of --resume, on one thread as the run."""
    return exit_code(in_child(RESUME)), Path("child.txt").read_text()


def change_pixel() -> None:
    pixels = np.array(Image.open(IMAGE))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(IMAGE)


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "a pixel": (change_pixel, "The data, though as many,"),
    "a byte": (lambda: IMAGE.write_bytes(IMAGE.read_bytes() + b"x"), "The files of the data"),
    "a name": (lambda: IMAGE.rename(IMAGE.with_name("55.png")), "The files of the data"),
    "labels": (lambda: IMAGE.rename("images/train/class2/0555.png"), "data"),
    "an image less": (lambda: Path("images/test/class1/1.png").unlink(), "data"),
    "ReLU to SiLU": (
        lambda: Path("net.py").write_text(NET.replace("ReLU", "SiLU")),
        "The model is not the one that this run was begun with: its outputs differ",
    ),
    "the last bits of a network": (
        lambda: Path("net.py").write_text(NET.replace("2d(16)", "2d(16, eps=1.01e-5)")),
        "The model is not the one that this run was begun with: its outputs differ",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_changed_run_is_refused(
    killed: Path, change: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDQ_TRUST", "1")
    change()
    code, messages = resumed()
    assert code == 2
    assert message in messages
    assert "begin a new run" in messages


def test_an_unchanged_run_goes_on_also_after_a_copy(killed: Path) -> None:
    code, messages = resumed()
    assert code == 0
    assert "since the run was begun" not in messages


def test_other_versions_devices_and_comments_are_named_and_the_run_goes_on(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDQ_TRUST", "1")
    state = torch.load("run/last.pt", weights_only=True)
    state["surroundings"] |= {"torch": "2.0.0", "device": "an old one"}
    torch.save(state, "run/last.pt")
    Path("net.py").write_text(f"{NET}# a comment\n")
    code, messages = resumed()
    assert code == 0, messages
    (line,) = [line for line in messages.splitlines() if "since the run was begun" in line]
    assert f"torch {torch.__version__} (then 2.0.0), device " in line
    assert "(then an old one), net.py: its last bits may differ" in line


# ---- the kernels that quantize


def as_long_run() -> None:
    from ddqcli.training import session

    session._COMPILE_FROM = 0


def as_long_run_without_compiler() -> None:
    as_long_run()
    os.environ["PATH"] = ""
    os.environ.pop("CC", None)
    cpu_launch.library.cache_clear()  # of the process that this one was forked from


def test_other_kernels_than_the_run_was_begun_with_are_named(killed: Path) -> None:
    state = torch.load("run/last.pt", weights_only=True)
    assert state["surroundings"]["kernels"] == "PyTorch"
    if cpu_launch.library() is None:
        pytest.skip("no C compiler here")
    assert exit_code(in_child(RESUME, before=as_long_run)) == 0
    messages = Path("child.txt").read_text()
    assert (
        "changed since the run was begun, kernels C (then PyTorch): its last bits may differ"
        in messages
    )


def test_a_long_run_without_a_compiler_says_so_once_and_how_to_get_one(killed: Path) -> None:
    command = "finetune model.pt --run-dir other --epochs 1"
    assert exit_code(in_child(command, before=as_long_run_without_compiler)) == 0
    messages = Path("child.txt").read_text()
    (line,) = [line for line in messages.splitlines() if "kernels in C" in line]
    assert "training is slower: no C compiler is found; install gcc or clang" in line
    state = torch.load("other/last.pt", weights_only=True)
    assert state["surroundings"]["kernels"] == "PyTorch"


# ---- the fingerprint of files


def test_the_order_on_disk_and_other_files_do_not_count(tmp_path: Path) -> None:
    for name in ("a/train/x", "a/train/y", "b/train/y", "b/train/x", "b/notes"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    first, second = (fingerprint_of_files(str(tmp_path / name)) for name in "ab")
    assert first == second != ""


def test_large_data_are_read_whole_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "LARGE", 250_000)
    (tmp_path / "train").mkdir()
    contents = {tmp_path / "train" / name: bytearray(200_000) for name in "ab"}
    for path, content in contents.items():
        path.write_bytes(content)
    notes: list[str] = []
    first = fingerprint_of_files(str(tmp_path), notes.append)
    assert fingerprint_of_files(str(tmp_path), notes.append) == first
    assert notes == ["reading 0 GB of data once, so that --resume knows them again"]
    seen = {first}
    for path, content in contents.items():
        for place in (0, 100_000, 199_999):
            content[place] = 1
            times = path.stat()
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some tools do
            seen.add(fingerprint_of_files(str(tmp_path), notes.append))
    assert len(seen) == len(notes) == 7
    monkeypatch.setattr(source_files, "LARGE", 1 << 30)
    assert fingerprint_of_files(str(tmp_path)) in seen, "which does not depend on the size"


@pytest.mark.parametrize("source", [None, "module:factory", "CIFAR10:there", "gone"])
def test_other_sources_have_none(source: str | None) -> None:
    assert fingerprint_of_files(source) == ""
