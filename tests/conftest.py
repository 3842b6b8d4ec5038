"""Fixtures of the tests that run commands: a user's folder in small, with and without a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_project import ddq, inside, make_project


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one finished run, runs/done; not to be changed."""
    folder = make_project(tmp_path_factory.mktemp("ddq") / "project")
    with inside(folder):
        answer = ddq("finetune", "model.pt", "--run-dir", "runs/done", "--quiet")
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def project(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder without runs; the test runs in it."""
    folder = tmp_path / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def finished(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder with its finished run, runs/done; the test runs in it."""
    folder = tmp_path / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    return folder
