"""Small files eat no memory and no time, and pipes never hang a reader."""

from __future__ import annotations

import bz2
import hashlib
import io
import os
import pickle
import resource
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_project import RECIPE, ddq, exit_code, folder_of_images

from ddqcli.artifact.decoder import HEAD
from ddqcli.checkpoint.torch_zip import load_structure
from ddqcli.data.image_folder import open_folder
from ddqcli.errors import RecipeError
from ddqcli.recipe.yaml_text import parse_sections

GIGABYTE = 1 << 30


def repacked(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the record of a `torch.save` file that is called `name`, with right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            is_it = record.rpartition("/")[2] == name
            archive.writestr(record, change(content) if is_it else content)


def strided(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)


def strided_in_final(path: Path) -> None:
    final = torch.load(path, weights_only=True)
    final["floats"]["1.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(final, path)


def memo(path: Path) -> None:
    """Insert five bytes that store a value at index 2^28 of the pickle's memo."""
    torch.save({"w": torch.ones(4, 4)}, path)
    bomb = pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 1 << 28) + pickle.POP
    repacked(path, "data.pkl", lambda raw: raw[:2] + bomb + raw[2:])


def manifest(path: Path) -> None:
    """Write a ddq file whose manifest unpacks to 4 GB, under a right digest."""
    packed = bz2.compress(bytes(1 << 26)) * 64
    header = HEAD + b"0" * 64 + b'","version":"1"},"manifest":{"data_offsets":[0,%d],' % len(packed)
    header += b'"dtype":"U8","shape":[%d]}}' % len(packed)
    raw = bytearray(len(header).to_bytes(8, "little") + header + packed)
    raw[50:114] = hashlib.sha256(raw).hexdigest().encode()
    path.write_bytes(raw)


def overlapping(path: Path) -> None:
    """Write a zip file with a thousand names for the same megabyte."""
    torch.save({"w": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (data,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
        archive.filelist += [data] * 1000
        archive._didModify = True


def npz_claim(path: Path) -> None:
    """Write an array that claims a million million values in its header."""
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**3, 10**3)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", header.getvalue())


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
