"""How many processes run the tests; and a user's folder in small, with and without a finished run, for those of commands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch is imported: processes that share the cores take one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tiny_project import ddq, inside, make_project


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several for the whole suite, one file after the other in each; none where files or tests are named."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count() or 1) if whole else 0


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
