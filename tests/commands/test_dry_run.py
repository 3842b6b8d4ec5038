"""`ddq finetune --dry-run` checks model, recipe, budget and data, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_project import ddq, images

DATA = """
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

def data():
    images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 4
    {change}
    parts = {{"train": TensorDataset(images, labels), "val": TensorDataset(images, labels)}}
    return parts | {more}

def loss(output, labels):
    return F.cross_entropy(output, labels)

def wrong(output, labels):
    return output.nonsense

def invalid(output, labels):
    return (output.argmax(1) == labels).float() / 0 * 0

def leaves(output, labels):
    raise SystemExit(3)

class Broken:
    def __init__(self, error):
        self.error = error
    def __len__(self):
        return 64
    def __getitem__(self, index):
        raise self.error
"""
# What is wrong, and the end of the message of a dry run, as of a real one.
FAULTS = {
    "no labels for the loss": (
        {"more": '{"loss": wrong}'},
        "The loss of task.py:data failed on (output, target) of a batch: AttributeError: 'Tensor' "
        "object has no attribute 'nonsense'; it must return the mean loss of the batch as a tensor "
        "of one value; `ddq --debug ...` shows where.",
    ),
    "a loss without a gradient": (
        {"more": '{"loss": lambda o, y: F.cross_entropy(o.detach(), y)}'},
        "The loss of task.py:data returned a value without a gradient; compute it from the output",
    ),
    "a loss of each sample": (
        {"more": '{"loss": lambda o, y: F.cross_entropy(o, y, reduction="none")}'},
        "The loss of task.py:data returned shape [",
    ),
    "a metric that fails": (
        {"more": '{"metric": wrong}'},
        "The metric of task.py:data failed on (output, target) of a batch: AttributeError: ",
    ),
    "a loss that exits": (
        {"more": '{"loss": leaves}'},
        "The loss of task.py:data failed on (output, target) of a batch: SystemExit: 3; it must",
    ),
    "a metric that exits": (
        {"more": '{"metric": leaves}'},
        "The metric of task.py:data failed on (output, target) of a batch: SystemExit: 3; ",
    ),
    "a data set that fails": (
        {"more": '{"train": Broken(OSError("no disk"))}'},
        "of the data cannot be read: OSError: no disk",
    ),
    "a data set that exits": (
        {"more": '{"train": Broken(SystemExit(3))}'},
        "of the data cannot be read: SystemExit: 3",
    ),
    "a DataLoader that exits": (
        {"more": '{"train": DataLoader(Broken(SystemExit(3)), 16)}'},
        "Batch 0 of the data cannot be read: SystemExit: 3",
    ),
    "a misspelled loss": (
        {"more": '{"losses": loss}'},
        "returned a mapping with train, val, losses; 'losses' is unknown; did you mean 'loss'?",
    ),
    "evaluation inputs that are not finite": (
        {"change": "images = images.clone(); images[0, 0, 0, 0] = float('nan')"},
        "Batch 0 of the evaluation data holds NaN or infinite values; repair the data.",
    ),
    "three channels": (
        {"change": "images = images.repeat(1, 3, 1, 1)"},
        "The model cannot run on these data: RuntimeError: Given groups=1",
    ),
    "classes that the model lacks": (
        {"change": "labels = 0 * labels + 40", "more": '{"loss": loss}'},
        "The loss of task.py:data failed on (output, target) of a batch: IndexError: Target 40 is "
        "out of bounds; it must return",
    ),
    "a factory that fails": ({"change": "raise KeyError('images')"}, "KeyError"),
}


@pytest.mark.parametrize(("parts", "message"), FAULTS.values(), ids=FAULTS)
def test_data_that_a_run_refuses_are_refused_with_the_same_message(
    project: Path, parts: dict[str, str], message: str
) -> None:
    text = DATA.format(**{"change": "pass", "more": "{}", **parts})
    Path("task.py").write_text(text)
    command = ["finetune", "model.pt", "--data", "task.py:data", "--max-steps", "1"]
    dry, real = ddq(*command, "--dry-run"), ddq(*command)
    assert dry.code == real.code == 2
    assert message in dry.err
    assert dry.err.splitlines()[-1] == real.err.splitlines()[-1]


@pytest.mark.parametrize("options", [(), ("--target-size", "9kB", "--target-format", "onnx")])
def test_a_network_that_exits_is_named(options: tuple[str, ...], project: Path) -> None:
    if options:
        pytest.importorskip("onnxscript")
    code = Path("net.py").read_text().replace("nn.Linear(16, 4),", "nn.Linear(16, 4), Leaves(),")
    code += "\nclass Leaves(nn.Module):\n    def forward(self, x):\n        raise SystemExit(3)\n"
    Path("net.py").write_text(code)
    command = ["finetune", "model.pt", *options, "--max-steps", "1"]
    for answer in (ddq(*command, "--dry-run"), ddq(*command)):
        assert answer.code == 2
        assert "The model cannot run on these data: SystemExit: 3; " in answer.err


def test_files_are_checked_too(project: Path) -> None:
    command = ["finetune", "model.pt", "--set", "data.mean=[0.5,0.5]", "--set", "data.std=[1,1]"]
    dry, real = ddq(*command, "--dry-run"), ddq(*command)
    notes = [line for line in real.err.splitlines() if not line.startswith("run: ")]
    assert (dry.code, dry.err.splitlines()) == (real.code, notes)
    Path("images.npz").unlink()
    dry, real = ddq("finetune", "model.pt", "--dry-run"), ddq("finetune", "model.pt")
    assert (dry.code, dry.err.splitlines()[-1]) == (2, real.err.splitlines()[-1])


def test_nothing_is_written(project: Path) -> None:
    before = set(Path().iterdir())
    answer = ddq("finetune", "model.pt", "--dry-run", "--json")
    assert answer.code == 0
    assert (answer.data["run_dir"], answer.data["accuracy"]) == (None, None)
    assert answer.data["totals"]["bytes"] <= answer.data["totals"]["budget_bytes"]
    assert set(Path().iterdir()) - before <= {Path("__pycache__")}


def test_the_float_metric_of_one_batch_is_that_of_its_samples(project: Path) -> None:
    """A batch of small images for evaluation has 500 samples."""
    data = images(601, "x_test", "y_test")
    np.savez("images.npz", **images(80, "x_train", "y_train"), **data)
    answer = ddq("finetune", "model.pt", "--dry-run")
    scope: dict[str, Any] = {}
    exec(Path("net.py").read_text(), scope)
    network = scope["build"]().eval()
    network.load_state_dict(torch.load("model.pt"))
    outputs = network((torch.from_numpy(data["x_test"])[:, None] / 255 - 0.5) / 0.5)
    right = outputs.argmax(1).numpy() == data["y_test"]
    line = "float accuracy on one batch: {:.2f} %"
    expected, of_all = (line.format(100 * part.mean()) for part in (right[:500], right))
    assert expected != of_all
    assert answer.err.splitlines().count(expected) == 1


def test_a_normalization_that_does_not_fit_is_a_warning(project: Path) -> None:
    flags = ["--set", "data.mean=[3]", "--set", "data.std=[0.1]", "--dry-run", "--json"]
    (warning,) = ddq("finetune", "model.pt", *flags).data["warnings"]
    assert "the inputs are not as in training" in warning


def test_the_data_of_a_sweep_are_checked_once(project: Path) -> None:
    answer = ddq("finetune", "model.pt", "--target-bits", "6,4,3", "--dry-run")
    assert answer.code == 0
    assert answer.err.count("data: 70 train") == 1
    Path("images.npz").unlink()
    assert ddq("finetune", "model.pt", "--target-bits", "6,4", "--dry-run").code == 2


def test_a_metric_that_is_nan_is_refused(project: Path) -> None:
    """At the first batch; a run counts all of them."""
    Path("task.py").write_text(DATA.format(change="pass", more='{"metric": invalid}'))
    answer = ddq("finetune", "model.pt", "--data", "task.py:data", "--dry-run")
    assert answer.code == 2
    assert "The metric accuracy is NaN or infinite for 16 of 16 evaluation samples" in answer.err


def test_a_training_batch_with_nan_is_named(project: Path) -> None:
    train = '"train": TensorDataset(images / 0 * 0, labels)'
    text = DATA.format(change="pass", more=f'{{{train}, "loss": loss}}')
    Path("task.py").write_text(text)
    answer = ddq("finetune", "model.pt", "--data", "task.py:data", "--dry-run")
    assert answer.code == 2
    assert "The first training batch holds NaN or infinite values" in answer.err
