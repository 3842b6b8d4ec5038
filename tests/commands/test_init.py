"""`ddq init` writes a recipe for the model and data at hand, which `ddq finetune` picks up."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_project import ddq, folder_of_images

from ddqcli.recipe.file import load_recipes


@pytest.fixture
def bare(project: Path) -> Path:
    """The project without its recipe."""
    (project / "ddq.yaml").unlink()
    return project


def test_the_recipe_is_what_finetune_needs(bare: Path) -> None:
    answer = ddq("init", "model.pt", "--arch", "net.py:build", "--json")
    assert answer.code == 0, answer.err
    (recipe,) = load_recipes(Path("ddq.yaml"))
    assert (recipe.model.checkpoint, recipe.model.arch) == ("model.pt", "net.py:build")
    assert (recipe.data.source, recipe.data.mean, recipe.data.std) == ("images.npz", [0.5], [0.5])
    assert recipe.budget.target == "4 bits"
    assert answer.data["model"] == {
        "checkpoint": "model.pt",
        "arch": "net.py:build",
        "parameters": sum(value.numel() for value in torch.load("model.pt").values()),
        "bytes": sum(v.numel() * v.element_size() for v in torch.load("model.pt").values()),
    }
    assert answer.data["data"] == {
        "source": "images.npz",
        "train": 80,
        "val": 32,
        "classes": 4,
        "shape": [1, 8, 8],
        "normalized": False,
    }
    assert answer.data["missing"] == []
    assert ddq("finetune", "--dry-run").code == 0
    run = ddq("finetune", "--max-steps", "1", "--json")
    assert run.data["source"]["arch"] == "net.py:build"


def test_the_last_line_is_a_command_that_works(bare: Path) -> None:
    Path("sub").mkdir()
    flags = ["--arch", "net.py:build", "-o", "sub/my recipe.yaml"]
    out = ddq("init", "model.pt", *flags).out
    assert out.splitlines()[-1] == "next       ddq finetune --recipe 'sub/my recipe.yaml' --dry-run"
    assert yaml.safe_load(Path("sub/my recipe.yaml").read_text())["model"] == {
        "checkpoint": "../model.pt",
        "arch": "../net.py:build",
    }
    assert ddq("finetune", "--recipe", "sub/my recipe.yaml", "--dry-run").code == 0


def test_an_existing_recipe_is_kept_unless_forced(bare: Path) -> None:
    Path("ddq.yaml").write_text("mine")
    answer = ddq("init", "model.pt", "--arch", "net.py:build")
    assert answer.code == 2
    assert answer.err == ("Error: ddq.yaml exists; --force replaces it, -o FILE writes another.\n")
    assert Path("ddq.yaml").read_text() == "mine"
    assert ddq("init", "model.pt", "--arch", "net.py:build", "--force").code == 0
    assert load_recipes(Path("ddq.yaml"))


def test_neither_the_model_nor_a_link_is_ever_replaced(bare: Path) -> None:
    before = Path("model.pt").read_bytes()
    answer = ddq("init", "model.pt", "--arch", "net.py:build", "-o", "model.pt", "--force")
    assert (answer.code, Path("model.pt").read_bytes()) == (2, before)
    Path("ddq.yaml").symlink_to("elsewhere.yaml")
    for flags in ([], ["--force"]):
        assert ddq("init", "model.pt", "--arch", "net.py:build", *flags).code == 2
    assert not Path("elsewhere.yaml").exists()


def test_a_folder_without_anything_gets_a_recipe_to_fill_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = ddq("init").out
    assert "missing    checkpoint: none is here; name it with MODEL" in out
    assert "missing    data: none is here; name it with --data" in out
    assert "recipe     ddq.yaml was written and is incomplete; fill it in, or begin again:" in out
    assert out.splitlines()[-1] == "next       ddq init MODEL --data DATA --force"
    (recipe,) = load_recipes(Path("ddq.yaml"))
    assert recipe.model.checkpoint is None


def test_several_candidates_are_named_and_none_is_taken(bare: Path) -> None:
    torch.save({}, "other.pt")
    folder_of_images(Path("pictures"))
    missing = ddq("init", "--json").data["missing"]
    assert missing == [
        "checkpoint: several are here, model.pt, other.pt; name it with MODEL",
        "data: several are here, images.npz, pictures; name it with --data",
    ]


def test_color_images_keep_the_default_normalization(bare: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {f"x_{s}": random.integers(0, 256, (8, 6, 5, 3), np.uint8) for s in ("train", "val")}
    labels = {f"y_{s}": np.arange(8) % 2 for s in ("train", "val")}
    np.savez("color.npz", **arrays, **labels)
    data = ddq("init", "model.pt", "--arch", "net.py:build", "--data", "color.npz", "--json").data
    assert data["data"]["shape"] == [3, 6, 5]
    assert not {"data.mean", "data.std"} & data["recipe"].keys()


def test_an_architecture_that_is_not_recognized_is_missing(bare: Path) -> None:
    data = ddq("init", "model.pt", "--json").data
    assert data["model"]["arch"] is None
    assert [text.partition(":")[0] for text in data["missing"]] == ["model.arch"]
    assert load_recipes(Path("ddq.yaml"))


def test_an_incomplete_recipe_ends_with_the_command_that_completes_it(bare: Path) -> None:
    out = ddq("init", "model.pt", "-o", "my recipe.yaml").out
    command = "ddq init model.pt --arch net.py:build --data images.npz -o 'my recipe.yaml' --force"
    assert out.splitlines()[-1] == f"next       {command}"
    assert not ddq(*shlex.split(command)[1:], "--json").data["missing"]


def test_a_factory_of_data_is_named_and_not_called(bare: Path) -> None:
    Path("task.py").write_text("raise SystemExit(9)")
    answer = ddq("init", "model.pt", "--arch", "net.py:build", "--data", "task.py:make", "--json")
    assert (answer.code, answer.data["data"]) == (0, None)
    assert answer.data["recipe"]["data.source"] == "task.py:make"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("gone.pt", "There is no checkpoint gone.pt in "),
        ("model.pt --arch net.py:gone", "net.py"),
        ("model.pt --arch net.py:build --data gone", "The data gone do not exist"),
        ("model.pt --arch net.py:build -o gone/a.yaml", "gone/a.yaml cannot be written"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_written(bare: Path, flags: str, message: str) -> None:
    answer = ddq("init", *flags.split())
    assert answer.code == 2
    assert message in answer.err
    assert not Path("ddq.yaml").exists()
