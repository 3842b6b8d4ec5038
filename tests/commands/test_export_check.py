"""`ddq export --check FILE`: an existing file is what was trained, or the exit code tells."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgeries import with_manifest
from tiny_project import RECIPE, ddq

from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.read import Artifact, read_artifact
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.encode_run import portable_recipe

RUN, FILE = Path("runs/done"), Path("runs/done/model.safetensors")


@pytest.fixture
def exported(finished: Path, exported_file: Path) -> Path:
    """The folder with a finished run and the file exported from it."""
    shutil.copy(exported_file, FILE)
    return finished


def rewrite(file: Path, artifact: Artifact) -> None:
    """A whole file, digest included, of other content."""
    tables = list(artifact.quantized.values()), list(artifact.activations.values())
    rest = artifact.floats, artifact.aliases, artifact.meta, artifact.constants
    file.write_bytes(encode_artifact(*tables, *rest)[0])


def test_a_good_file_is_confirmed(exported: Path) -> None:
    answer = ddq("export", "--check", FILE)
    assert (answer.code, answer.err) == (0, "")
    assert "read back as trained" in answer.out
    assert "the same bits as the trained network's" in answer.out
    assert "as reported" in answer.out
    written = ddq("export", "--json").data
    assert ddq("export", "--check", FILE, "--json").data == written
    assert written["behaviour"]["outputs"] == 0
    assert written["behaviour"]["accuracy"] == pytest.approx(written["behaviour"]["expected"])


def test_the_file_stays_as_it_was_and_may_lie_anywhere(exported: Path) -> None:
    raw = FILE.read_bytes()
    FILE.rename("elsewhere.bin")
    before = sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts)
    assert ddq("export", "--check", "elsewhere.bin").code == 0  # with the newest run
    assert ddq("export", RUN, "--check", "elsewhere.bin").code == 0
    assert Path("elsewhere.bin").read_bytes() == raw
    assert sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts) == before


def test_a_file_rounded_to_float16_is_checked_as_such(exported: Path) -> None:
    assert ddq("export", "--half", "-q").code == 0
    answer = ddq("export", "--check", FILE)
    assert answer.code == 0
    assert "rounded to float16" in answer.out


def test_a_flipped_bit_is_exit_code_4(exported: Path) -> None:
    raw, draw = FILE.read_bytes(), random.Random(0)
    for bit in [8 * 8, 60 * 8, 8 * len(raw) - 1, *draw.sample(range(8 * 114, 8 * len(raw)), 20)]:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        FILE.write_bytes(damaged)
        answer = ddq("export", "--check", FILE, "--json")
        unknown = bit < 8 * 50  # what tells it to be a ddq file at all
        assert answer.code == (2 if unknown else 4)
        assert ("is not a ddq file" if unknown else "is damaged or incomplete") in answer.err
        assert answer.envelope["errors"] == [answer.err.removeprefix("Error: ").rstrip()]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["meta"].update(more=1),
        lambda manifest: manifest["meta"].pop("recipe"),
        lambda manifest: manifest["meta"]["report"].pop("course"),
        lambda manifest: None,  # other spaces
    ],
    ids=["note", "no recipe", "no course", "spaces"],
)
def test_other_content_beside_the_right_tensors_is_exit_code_4(
    exported: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    FILE.write_bytes(with_manifest(FILE.read_bytes(), change))
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert "differs from what this version of ddq exports" in answer.err


def test_a_changed_weight_under_a_right_digest_is_exit_code_4(exported: Path) -> None:
    artifact = read_artifact(FILE)
    tensor = artifact.quantized["0.weight"]
    indices = tensor.indices.copy()
    indices[5] ^= 1
    artifact.quantized["0.weight"] = replace(tensor, indices=indices)
    rewrite(FILE, artifact)
    answer = ddq("export", "--check", FILE)
    assert (answer.code, answer.err) == (
        4,
        f"Error: {FILE} differs from what was trained in 0.weight.\n",
    )


def test_a_tensor_more_is_exit_code_4(exported: Path) -> None:
    artifact = read_artifact(FILE)
    rewrite(FILE, replace(artifact, floats={**artifact.floats, "more": np.zeros(1, np.float32)}))
    answer = ddq("export", "--check", FILE)
    assert (answer.code, answer.err) == (
        4,
        f"Error: {FILE} does not hold the tensors that were trained.\n",
    )


def test_a_file_of_another_run_is_exit_code_4_and_says_so(exported: Path) -> None:
    assert (
        ddq(
            "finetune", "model.pt", "--run-dir", "runs/other", "--quiet", "--set", "train.seed=1"
        ).code
        == 0
    )
    answer = ddq("export", "runs/other", "--check", FILE)
    assert answer.code == 4
    assert f"{FILE} does not come from runs/other: its " in answer.err
    assert f"`ddq export RUN --check {FILE}`" in answer.err
    assert ddq("export", "--check", FILE).code == 0, (
        "the run beside the file comes before the newest"
    )


def test_without_the_architecture_the_bits_are_compared_and_the_rest_is_said_to_be_unchecked(
    exported: Path,
) -> None:
    Path("net.py").unlink()
    answer = ddq("export", "--check", FILE)
    assert answer.code == 0
    assert "read back as trained" in answer.out
    assert "unchecked  outputs and accuracy were not compared: " in answer.out
    data = ddq("export", "--check", FILE, "--json").data
    assert (data["behaviour"]["outputs"], data["behaviour"]["accuracy"]) == (None, None)
    assert len(data["behaviour"]["unchecked"]) == 1


def test_without_the_data_outputs_are_still_compared(exported: Path) -> None:
    Path("images.npz").unlink()
    data = ddq("export", "--check", FILE, "--json").data
    assert data["behaviour"]["outputs"] == 0
    assert data["behaviour"]["accuracy"] is None
    assert "accuracy was not compared" in data["behaviour"]["unchecked"][0]


def test_without_its_run_a_file_is_at_least_said_to_be_undamaged(
    exported: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    FILE.rename(alone / "model.safetensors")
    os.chdir(alone)
    answer = ddq("export", "--check", "model.safetensors")
    assert answer.code == 2
    assert "model.safetensors is undamaged, but there is nothing to compare it with: " in answer.err
    assert "There is no run under" in answer.err


def test_what_is_no_file_or_no_ddq_file_is_wrong_use(exported: Path) -> None:
    for path in ("gone.safetensors", "images.npz", "runs"):
        assert ddq("export", "--check", path).code == 2
    assert ddq("export", "--check", FILE, "--half").code == 2


def test_no_path_of_the_machine_travels_in_the_file(exported: Path) -> None:
    said = {
        "model": {
            "checkpoint": "/m/a.pt",
            "arch": "/m/net.py:build",
            "kwargs": {"weights": "/m/w.pt", "width": 8},
        },
        "data": {
            "source": "CIFAR10:/d/c10",
            "kwargs": {"roots": ["/d/one", "~/two", {"x": "three/four"}], "n": None},
        },
    }
    assert portable_recipe(Recipe.model_validate(said)) == {
        "model": {
            "checkpoint": "a.pt",
            "arch": "net.py:build",
            "kwargs": {"weights": "w.pt", "width": 8},
        },
        "data": {
            "source": "CIFAR10:c10",
            "kwargs": {"roots": ["one", "two", {"x": "three/four"}], "n": None},
        },
    }
    for source, name in {
        "images/": "images",
        ".": ".",
        "pkg.mod:make": "pkg.mod:make",
        "a/b.npz": "b.npz",
    }.items():
        assert portable_recipe(Recipe.model_validate({"data": {"source": source}}))["data"] == {
            "source": name
        }
    assert "name: tiny" in RECIPE
    meta = read_artifact(FILE).meta
    assert meta["recipe"]["name"] == "tiny"
    assert str(exported) not in json.dumps(meta)
