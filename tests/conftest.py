"""Test processes and GPUs; and a small user's project, with and without a finished run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: parallel test processes take one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tiny_project import ddq, inside, make_project

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return up to 4 processes for the whole suite, none for named files or tests."""
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count() or 1) if whole_suite else 0


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs but from `pytest -m cuda`, which `test_on_a_gpu.py` runs where there is one.

    So all else is the same on every machine. It could not pass beside a GPU: once autograd has
    started the threads of one, no fork of this process can train.
    """
    if config.option.markexpr != "cuda":
        os.environ.setdefault("DDQ_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of garbage collections, and of what forks copy."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, or where it is hidden."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and `pytest -m cuda`")


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the records of the tests' runs out of the user's own state."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.delenv("DDQ_TRUST", raising=False)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Let fsync return at once: it guards against power cuts, which no test makes."""

    def fsync(descriptor: int) -> None:
        os.fstat(descriptor)  # a closed one is still an error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one finished run, runs/done; tests must not change it."""
    folder = make_project(tmp_path_factory.mktemp("ddq") / "project")
    with inside(folder):
        answer = ddq("finetune", "model.pt", "--run-dir", "runs/done", "--quiet")
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture(scope="session")
def exported_file(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file exported from that run; tests copy it."""
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    answer = ddq("export", pristine / "runs/done", "-o", path)
    assert answer.code == 0, answer.err
    return path


@pytest.fixture
def project(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project without runs, as working folder."""
    folder = tmp_path / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def finished(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project with its finished run, runs/done, as working folder."""
    folder = tmp_path / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    return folder
