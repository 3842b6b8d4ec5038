"""Data are found by name, and loaded the same from memory and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import CPU, load, same_batches, write_folder

from ddqcli.data import load as data_module
from ddqcli.data.load import load_data
from ddqcli.data.loaded_batches import LoadedBatches
from ddqcli.data.memory_batches import MemoryBatches
from ddqcli.errors import UsageError
from ddqcli.recipe.schema import DataSection

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"


def test_small_images_beyond_the_memory_limit_give_the_same_batches(tmp_path, monkeypatch):
    write_folder(tmp_path, each=5)
    in_memory = load(tmp_path, batch_size=4)
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 100)
    from_files = load(tmp_path, batch_size=4)
    assert isinstance(in_memory.train, MemoryBatches)
    assert isinstance(from_files.train, LoadedBatches)
    assert same_batches(list(in_memory.train.epoch(1)), list(from_files.train.epoch(1)))
    assert same_batches(list(in_memory.val.epoch(0)), list(from_files.val.epoch(0)))
    assert "kept in memory" in in_memory.note
    assert "read by 0 processes" in from_files.note


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/absent", "do not exist; give a folder"),
        (
            "CIFAR10:{}",
            r"torchvision's CIFAR10 .*datasets.CIFAR10\('.*', train=True, download=True\)",
        ),
        (
            "SVHN:{}",
            r"fetch it with torchvision.datasets.SVHN\('.*', split='train', download=True\)",
        ),
        ("ImageNet:{}", "does not hold torchvision's ImageNet"),
        ("CIFAR11:{}", "torchvision has no data set CIFAR11; did you mean CIFAR10"),
        ("ImageFolder:{}", "is not split into training and evaluation"),
        ("no_such_module:factory", "no_such_module"),
    ],
)
def test_sources_that_cannot_be_found(source, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load(source.format(tmp_path))


def test_no_source():
    with pytest.raises(UsageError, match="No data are named; give --data"):
        load_data(DataSection(), seed=0, device=CPU)


def test_quickstart_model_reads_its_test_images():
    from ddqcli.recipe.factory import import_factory

    model = import_factory(f"{QUICKSTART / 'model.py'}:digits_net")()
    model.load_state_dict(torch.load(QUICKSTART / "model.pt", weights_only=True))
    data = load(QUICKSTART / "digits.npz", mean=[0.305], std=[0.376])
    with torch.no_grad():
        hits = sum(
            data.metric(model.eval()(inputs), targets).sum().item()
            for inputs, targets in data.val.epoch(0)
        )
    assert (hits, data.val.samples) == (357, 359)
