"""Data factories: batches, loss and metric of a user's own, and their faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import load

from ddqcli.errors import DataError, UsageError

FACTORY = """
import torch
from torch.utils.data import DataLoader, TensorDataset

class Squares:
    def __len__(self): return 6
    def __getitem__(self, index):
        if index == 4 and broken: raise ValueError("no square of four")
        return torch.tensor([float(index) ** 2]), index % 2

broken = False

def plain(scale=1.0):
    x, y = torch.arange(6.0)[:, None] * scale, torch.arange(6) % 2
    return {"train": TensorDataset(x, y), "val": DataLoader(TensorDataset(x, y), batch_size=4)}

def own():
    class Made:
        train, val = Squares(), Squares()
        loss = staticmethod(lambda output, target: (output - target).abs().mean())
        metric = staticmethod(lambda output, target: 1.0 - (output - target).abs())
    return Made()

def damaged():
    global broken
    broken = True
    return {"train": Squares(), "val": Squares()}

def nothing(): pass
def raises(): raise RuntimeError("the disk is away")
def lacking(): return {"train": Squares()}
def once(): return {"train": Squares(), "val": iter([])}
def empty(): return {"train": Squares(), "val": DataLoader([])}
def no_loss(): return {"train": Squares(), "val": Squares(), "loss": 3}
def mean_metric():
    return {"train": Squares(), "val": Squares(), "metric": lambda output, target: output.mean()}
def triples(): return {"train": Squares(), "val": DataLoader([(1.0, 2.0, 3.0)] * 3)}
def unlabelled():
    x = torch.arange(12.0).reshape(6, 2)
    return {"train": TensorDataset(x), "val": [{"x": row} for row in x]}
def trees():
    rows = [({"a": torch.ones(2) * k, "b": k}, (torch.tensor(k), {"c": [k, k]})) for k in range(40)]
    return {"train": rows, "val": DataLoader(rows, batch_size=3)}
"""


@pytest.fixture
def factory(tmp_path: Path) -> Callable[[str], str]:
    file = tmp_path / "own_data.py"
    file.write_text(FACTORY)
    return lambda name: f"{file}:{name}"


def test_factory_with_keyword_arguments_and_ready_batches(factory):
    data = load(factory("plain"), kwargs={"scale": 2.0}, batch_size=3)
    inputs, targets = zip(*data.train.epoch(0), strict=True)
    assert torch.cat(inputs).flatten().sort().values.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert [len(target) for target in targets] == [3, 3]
    assert [len(inputs) for inputs, _ in data.val.epoch(0)] == [4, 2]
    assert data.val.samples == 6


def test_inputs_and_targets_are_trees_of_tensors(factory):
    data = load(factory("trees"), batch_size=8)
    first, last = next(data.val.epoch(0)), list(data.val.epoch(0))[-1]
    inputs, (number, nested) = first
    assert inputs["a"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert [inputs["b"].tolist(), number.tolist()] == [[0, 1, 2]] * 2
    assert [c.tolist() for c in nested["c"]] == [[0, 1, 2]] * 2
    assert len(last[0]["b"]) == 1
    assert (data.val.samples, data.train.samples, data.held_out.samples) == (40, 35, 5)
    seen = torch.cat([inputs["b"] for inputs, _ in data.train.epoch(0)])
    held_out = torch.cat([inputs["b"] for inputs, _ in data.held_out.epoch(0)])
    assert not set(seen.tolist()) & set(held_out.tolist())
    assert data.fingerprint() == load(factory("trees"), batch_size=4).fingerprint()


def test_samples_without_targets_are_unlabelled_data(factory):
    data = load(factory("unlabelled"), batch_size=3)
    (inputs, targets), _ = data.val.epoch(0)
    assert inputs["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert targets is None
    assert [targets for _, targets in data.train.epoch(0)] == [None, None]


def test_factory_with_its_own_loss_and_metric(factory):
    data = load(factory("own"), batch_size=4)
    (inputs, targets), _ = data.val.epoch(0)
    assert inputs.tolist() == [[0.0], [1.0], [4.0], [9.0]]
    assert data.loss(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0])).item() == 0.25
    assert data.metric(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0])).tolist() == [0.5, 1.0]
    assert data.note.endswith("its own loss and metric")
    assert (data.own_loss, load(factory("plain")).own_loss) == (True, False)
    assert targets.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned a NoneType; train and val missing"),
        ("raises", "failed: RuntimeError: the disk is away"),
        ("lacking", "returned a mapping with train; val missing"),
        (
            "once",
            "is a list_iterator; give a data set, or batches that can be run through again",
        ),
        ("empty", "val of .* holds no samples"),
        ("no_loss", "a loss that is no function"),
        ("absent", "absent"),
    ],
)
def test_faulty_factories(name, message, factory):
    with pytest.raises(UsageError, match=message):
        load(factory(name))


def test_faults_that_show_when_data_of_a_factory_are_read(factory):
    with pytest.raises(
        DataError, match="Sample 4 of the data cannot be read: ValueError: no square of four"
    ):
        list(load(factory("damaged"), workers=2).val.epoch(0))
    with pytest.raises(DataError, match=r"is a list \(Tensor, Tensor, Tensor\); give \(inputs"):
        list(load(factory("triples")).val.epoch(0))
    with pytest.raises(DataError, match=r"returned shape \[\]; 2 scores are needed"):
        load(factory("mean_metric")).metric(torch.zeros(2), torch.zeros(2))
