"""Paths in a recipe are relative to its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from recipe_files import load_recipe, written

from ddqcli.recipe.file import dump_recipes


def test_paths_in_a_recipe_are_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "model: {checkpoint: m.pt, arch: 'nets/net.py:build'}\ndata: {source: images}\n"
    text += "train: {teacher: {checkpoint: big.pt, arch: 'nets/net.py:big'}}"
    path = written(tmp_path / "a b", text)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("a b/ddq.yaml"))
    assert recipe.model.checkpoint == "a b/m.pt"
    assert recipe.model.arch == "a b/nets/net.py:build"
    assert recipe.data.source == "a b/images"
    assert recipe.train.teacher.checkpoint == "a b/big.pt"
    assert recipe.train.teacher.arch == "a b/nets/net.py:big"
    monkeypatch.chdir(path.parent)
    assert load_recipe(Path("ddq.yaml")).model.checkpoint == "m.pt"


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("model: {arch: %s}", "resnet18"),
        ("model: {arch: %s}", "package.module:factory"),
        ("data: {source: %s}", "package.module:factory"),
        ("data: {source: %s}", "/data/images"),
        ("data: {source: %s}", "CIFAR10:/data"),
    ],
)
def test_what_is_no_relative_path_stays_as_it_is(tmp_path: Path, section: str, value: str) -> None:
    recipe = load_recipe(written(tmp_path, section % value))
    assert value in (recipe.model.arch, recipe.data.source)


def test_the_home_folder_has_its_short_name(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "data: {source: ~/images}")).data.source == str(
        Path.home() / "images"
    )


def test_the_root_of_a_data_set_is_beside_the_recipe_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "cifar").mkdir()
    assert (
        load_recipe(written(tmp_path, "data: {source: 'CIFAR10:cifar'}")).data.source
        == f"CIFAR10:{tmp_path / 'cifar'}"
    )


def test_flags_are_relative_to_the_working_folder(tmp_path: Path) -> None:
    assert (
        load_recipe(written(tmp_path, "name: x"), {"data.source": "images"}).data.source == "images"
    )


def test_a_resolved_recipe_means_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "else", "cifar"):
        Path(folder).mkdir()
    flags = {
        "model.checkpoint": "m.pt",
        "model.arch": "net.py:build",
        "data.source": "CIFAR10:cifar",
        "name": "é",
    }
    recipe = load_recipe(None, flags)
    Path("run/recipe.yaml").write_text(dump_recipes([recipe], Path("run")), encoding="utf-8")
    assert load_recipe(Path("run/recipe.yaml")) == recipe
    monkeypatch.chdir("else")
    seen = load_recipe(Path("../run/recipe.yaml"))
    assert seen.model.checkpoint == os.path.join("..", "m.pt")
    assert seen.data.source == f"CIFAR10:{os.path.join('..', 'cifar')}"
