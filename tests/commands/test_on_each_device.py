"""Promises of `ddq finetune`, on each kind of device: on CUDA by `pytest -m cuda`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_project import ddq

from ddqcli.training.trainer import Trainer

on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
)

# Learned levels of inputs too, so that every kernel has a part.
SETTINGS = ["--set", "activations.bits=3", "-q"]

DYING = """
import os, signal
from ddqcli.cli.app import main
from ddqcli.training.trainer import Trainer

step, count = Trainer._train_step, iter(range(1000))

def counting(*args):
    if next(count) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)

Trainer._train_step = counting
main()
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: no fork of this one can train on CUDA."""
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def trained(run: str, device: str, *flags: str) -> bytes:
    """Train in this process; return the bytes of the exported file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        command = ["finetune", "model.pt", "--run-dir", run, "--device", device, *SETTINGS]
        answer = ddq(*command, *flags)
        assert answer.code == 0, answer.err
        assert ddq("export", run).code == 0
    finally:
        torch.set_num_threads(threads)
    return Path(run, "model.safetensors").read_bytes()


# On a CPU, test_finetune.py and test_export.py hold these three.


@pytest.mark.cuda
def test_the_same_seed_gives_the_same_bytes_also_after_a_kill(project: Path) -> None:
    first = trained("a", "cuda")
    assert trained("b", "cuda") == first
    assert trained("c", "cuda", "--seed", "1") != first
    command = ["finetune", "model.pt", "--run-dir", "d", "--device", "cuda", *SETTINGS]
    killed = python("-c", DYING, *command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert trained("d", "cuda", "--resume") == first


@pytest.mark.cuda
def test_what_was_trained_on_a_device_is_checked_on_a_cpu(project: Path) -> None:
    expected = trained("a", "cuda")
    Path("a/model.safetensors").unlink()
    arguments = ["-m", "ddqcli", "export", "a"]
    exported = python(*arguments, CUDA_VISIBLE_DEVICES="")
    assert exported.returncode == 0, exported.stderr
    assert Path("a/model.safetensors").read_bytes() == expected


@pytest.mark.cuda
def test_training_that_diverges_is_told_with_its_step(project: Path) -> None:
    flags = ["--set", "train.lr=1e30", "--epochs", "12", "--device", "cuda"]
    answer = ddq("finetune", "model.pt", *flags)
    assert answer.code == 0, answer.err
    assert re.search(r"warning: .* at step [123] of 48", answer.err)
    assert "training ends, and the best state, of step 0, is delivered" in answer.err


@on_each_device
def test_bfloat16_trains_within_the_budget(project: Path, device: str) -> None:
    trained("a", device, "--set", "train.precision=bfloat16")
    data = ddq("report", "a", "--json").data
    assert data["totals"]["bytes"] <= data["totals"]["budget_bytes"]
    losses = re.findall(r'"loss": ([\d.e-]+)', Path("a/metrics.jsonl").read_text())
    assert losses
    assert all(0 < float(loss) < 10 for loss in losses)


@on_each_device
def test_out_of_memory_is_one_sentence(
    project: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=device)

    monkeypatch.setattr(Trainer, "_train_step", full)
    answer = ddq("finetune", "model.pt", "--device", device, "--batch-size", "64")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == (
        "Error: Training failed: out of memory; try a smaller --set data.batch_size (now 64)."
    )
