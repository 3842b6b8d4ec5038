"""`torchrun` with two processes: one writer, everything evaluated once, and a run that goes on with another number of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_project import ddq

from ddqcli.data.batches import BatchOrder, Shard
from ddqcli.training import distributed


@pytest.mark.parametrize("samples", [1, 5, 16, 33])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_shards_of_a_set_are_the_set_each_sample_once(samples: int, count: int) -> None:
    shards = [BatchOrder(samples, 8, shard=Shard(rank, count)) for rank in range(count)]
    found = [index for order in shards for batch in order.batches(0) for index in batch.tolist()]
    assert sorted(found) == list(range(samples))


def test_the_shards_of_a_training_batch_are_that_batch() -> None:
    whole = BatchOrder(100, 16, seed=3).batches(5)
    shards = [BatchOrder(100, 16, seed=3, shard=Shard(rank, 2)).batches(5) for rank in range(2)]
    for batch, *parts in zip(whole, *shards, strict=True):
        assert sorted(batch.tolist()) == sorted(torch.cat(parts).tolist())


HERE = (
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "127.0.0.1:0",
    "--local-addr",
    "127.0.0.1",
)  # any free port


def torchrun(processes: int, *args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *HERE,
        "--nproc-per-node",
        str(processes),
    ]
    return subprocess.run(
        [*command, "-m", "ddqcli", *args], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_two_processes_train_one_model_and_one_goes_on_with_it(project: Path) -> None:
    first = torchrun(
        2, "finetune", "--run-dir", "run", "--max-steps", "7", "--json", folder=project
    )
    assert first.returncode == 0, first.stderr
    envelope = json.loads(first.stdout)  # one object: one process speaks
    assert envelope["data"]["totals"]["bytes"] <= envelope["data"]["totals"]["budget_bytes"]
    steps = [
        json.loads(line)["step"]
        for line in (project / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)

    (project / "run/report.json").unlink()  # as if it had been killed after its last checkpoint
    again = ddq("finetune", "--resume", "--run-dir", "run", "--json").data
    assert [row["bits"] for row in again["layers"]] == [
        row["bits"] for row in envelope["data"]["layers"]
    ]
    assert again["totals"] == envelope["data"]["totals"]


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29011", True),
        ("Read error [127.0.0.1]:46010: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_process_is_known_by_what_gloo_and_nccl_say(
    message: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not distributed.is_lost_peer(RuntimeError(message))  # alone, there is none to lose
    monkeypatch.setattr(distributed, "shard", lambda: Shard(0, 2))
    assert distributed.is_lost_peer(RuntimeError(message)) is lost
    assert not distributed.is_lost_peer(ValueError(message))


DYING = """
import os
from torch import nn

class Dying(nn.Flatten):
    steps = 0

    def forward(self, x):
        self.steps += self.training and x.requires_grad
        if os.environ.get("RANK") == "1" and self.steps == 8:
            os.kill(os.getpid(), 9)
        return super().forward(x)
"""


def test_a_process_that_dies_alone_ends_the_run_and_one_goes_on_with_it(project: Path) -> None:
    net = project / "net.py"
    net.write_text(DYING + net.read_text().replace("nn.Flatten()", "Dying()"))
    died = torchrun(2, "finetune", "--run-dir", "run", folder=project)
    assert died.returncode == 1
    assert "rank      : 1" in died.stderr
    assert "SIGKILL" in died.stderr
    # torchrun sends the other process a SIGTERM, which may come before that has noticed.
    told = r"Error: (Another process of this run ended, and none can go on alone|Terminated); `ddq finetune --resume"
    assert re.search(told, died.stderr), died.stderr

    answer = ddq("finetune", "--resume", "--run-dir", "run")
    assert answer.code == 0, answer.err
    assert "resumed run at step 6 of 12" in answer.err
