"""Two processes: one writes, each sample is evaluated once, and one process can resume the run."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny_project import ddq, exit_code, in_child
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ddqcli.cli.app import main
from ddqcli.commands import finetune
from ddqcli.data.batches import BatchOrder, Shard
from ddqcli.training import distributed

# ---- shards


@pytest.mark.parametrize("samples", [1, 5, 16, 33])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_shards_of_a_set_are_the_set_each_sample_once(samples: int, count: int) -> None:
    shards = [BatchOrder(samples, 8, shard=Shard(rank, count)) for rank in range(count)]
    indices = [index for order in shards for batch in order.batches(0) for index in batch.tolist()]
    assert sorted(indices) == list(range(samples))


def test_the_shards_of_a_training_batch_are_that_batch() -> None:
    whole = BatchOrder(100, 16, seed=3).batches(5)
    shards = [BatchOrder(100, 16, seed=3, shard=Shard(rank, 2)).batches(5) for rank in range(2)]
    for batch, *parts in zip(whole, *shards, strict=True):
        assert sorted(batch.tolist()) == sorted(torch.cat(parts).tolist())


# ---- runs


def run_rank(*args: str) -> None:
    """Run `ddq ARGS` in a process of torchrun. Its output goes to the files <rank>.out and .err."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    sys.argv = ["ddq", *args]
    with open(f"{rank}.out", "w") as sys.stdout, open(f"{rank}.err", "w") as sys.stderr:
        main()


def torchrun(*args: str) -> bool:
    """Run `ddq ARGS` under torchrun, in two forked processes. True if both succeed."""
    child = os.fork()
    if child:
        return exit_code(child) == 0
    try:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            start_method="fork",
            max_restarts=0,
        )
        elastic_launch(config, run_rank)(*args)
        os._exit(0)
    finally:
        os._exit(1)


def errors() -> str:
    return "\n".join(path.read_text() for path in Path().glob("*.err"))


@pytest.mark.parametrize("method", ["ddq", "sdq"])
def test_two_processes_train_one_model_and_one_process_resumes_it(
    project: Path, method: str
) -> None:
    """They draw alike: otherwise their levels would differ at a checkpoint, which is an error."""
    options = ("--max-steps", "7", "--method", method, "--json")
    assert torchrun("finetune", "--run-dir", "run", *options), errors()
    report = json.loads(Path("0.out").read_text())["data"]
    assert Path("1.out").read_text() == ""
    assert report["totals"]["bytes"] <= report["totals"]["budget_bytes"]
    lines = (project / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)

    (project / "run/report.json").unlink()  # as if killed after the last checkpoint
    again = ddq("finetune", "--resume", "--run-dir", "run", "--json").data
    assert [row["bits"] for row in again["layers"]] == [row["bits"] for row in report["layers"]]
    assert again["totals"] == report["totals"]


LOST = "Another process of this run ended or is silent, and this one cannot continue alone"
DYING = """
import os
import signal
import time
from torch import nn

class Dying(nn.Flatten):
    steps = 0

    def forward(self, x):
        self.steps += self.training and x.requires_grad
        if os.environ.get("RANK") == "1" and self.steps == 8:
            os.kill(os.getpid(), 9)
        return super().forward(x)
"""


def test_if_one_process_dies_the_other_stops_and_one_process_resumes_the_run(
    project: Path,
) -> None:
    net = project / "net.py"
    net.write_text(DYING + net.read_text().replace("nn.Flatten()", "Dying()"))
    assert not torchrun("finetune", "--run-dir", "run")
    # torchrun sends the other process a SIGTERM, which may come before it has noticed.
    assert re.search(
        f"Error: ({LOST}|Terminated); `ddq finetune --resume", Path("0.err").read_text()
    )

    answer = ddq("finetune", "--resume", "--run-dir", "run")
    assert answer.code == 0, answer.err
    assert "resumed run at step 6 of 12" in answer.err


def test_if_one_process_is_silent_the_other_stops(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its patience, which makes the test's seconds."""
    monkeypatch.setattr(distributed, "_PATIENCE", timedelta(seconds=5))
    pause = "signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(600)"
    net, silent = project / "net.py", DYING.replace("os.kill(os.getpid(), 9)", pause)
    net.write_text(silent + net.read_text().replace("nn.Flatten()", "Dying()"))
    assert not torchrun("finetune", "--run-dir", "run")
    assert f"Error: {LOST}; `ddq finetune --resume" in Path("0.err").read_text()


def test_a_process_whose_partners_do_not_come_ends_with_a_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(distributed, "_PATIENCE", timedelta(seconds=1))
    assert exit_code(in_child("finetune model.pt --run-dir run")) == 1
    assert f"Error: The 2 processes of this run did not meet at 127.0.0.1:{port}: " in (
        Path("child.txt").read_text()
    )
    assert not Path("run").exists()


DATA = """
import os, torch
from torch.utils.data import TensorDataset

def data(count):
    rank = os.environ.get("RANK", "0")
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(64) % 4
    if rank == "1":
        x, y = x[:count], (y[:count] + (count == 64)) % 4
    return {"train": TensorDataset(x, y), "val": TensorDataset(x, y)}
"""


def test_processes_with_other_code_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "code_files", lambda recipe: {"net.py": os.environ["RANK"]})
    assert not torchrun("finetune", "--run-dir", "run")
    assert "different code net.py: rank 1 differs from rank 0" in errors()
    assert not (project / "run").exists()


@pytest.mark.parametrize("count", [48, 64])
def test_processes_with_other_samples_or_labels_are_refused(project: Path, count: int) -> None:
    (project / "data.py").write_text(DATA)
    flags = ("--data", "data.py:data", "--set", f"data.kwargs.count={count}", "--run-dir", "run")
    assert not torchrun("finetune", *flags)
    assert "different data: rank 1 differs from rank 0" in errors()
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29011", True),
        ("Read error [127.0.0.1]:46010: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_process_is_recognized_by_the_messages_of_gloo_and_nccl(
    message: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not distributed.is_lost_peer(RuntimeError(message))  # a single process has no peer
    monkeypatch.setattr(distributed, "shard", lambda: Shard(0, 2))
    assert distributed.is_lost_peer(RuntimeError(message)) is lost
    assert not distributed.is_lost_peer(ValueError(message))
