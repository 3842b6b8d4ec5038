"""Some training samples are held out: random ones, plain, and never trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import CPU, load, pixels, same_batches, write_folder, write_npz
from torch import Tensor
from torch.utils.data import DataLoader

from ddqcli.data import load as data_module
from ddqcli.data.batches import Batches, Shard
from ddqcli.data.held_out import split_held_out
from ddqcli.data.load import load_data
from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.recipe.schema import DataSection


def whole(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """All samples of an epoch, as one batch."""
    inputs, targets = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def write_numbered(path: Path, count: int, **arrays: Any) -> Path:
    """Training images whose labels are their numbers."""
    return write_npz(path, x_train=pixels(count, 6, 5, 3), y_train=np.arange(count), **arrays)


@pytest.mark.parametrize(("samples", "size"), [(8, 1), (100, 12), (4096, 512), (50_000, 512)])
def test_an_eighth_of_the_samples_is_held_out_and_no_more_than_512(samples, size):
    train, held_out = split_held_out(samples, 3)
    assert (len(train), len(held_out)) == (samples - size, size)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(samples))
    for part in (train, held_out):
        assert torch.equal(part, part.sort().values)


def test_fewer_than_8_samples_are_all_trained_on_and_held_out():
    for samples in (0, 1, 7):
        for part in split_held_out(samples, 3):
            assert torch.equal(part, torch.arange(samples))


def test_the_choice_depends_on_the_seed_and_not_on_the_state_of_generators():
    torch.manual_seed(1)
    first = split_held_out(100, 3)
    torch.manual_seed(2)
    assert same_batches([first], [split_held_out(100, 3)])
    assert not torch.equal(first[1], split_held_out(100, 4)[1])


@pytest.mark.parametrize("seed", range(5))
def test_data_sorted_by_class_hold_out_all_classes(seed, tmp_path):
    data = load(write_folder(tmp_path, each=40), seed)
    _, targets = whole(data.held_out)
    assert len(targets) == data.held_out.samples == 10
    assert targets.unique().tolist() == [0, 1]
    assert torch.equal(targets, targets.sort().values), "in order"
    assert data.note.startswith("70 train, 10 held-out and 80 evaluation images of 2 classes")


@pytest.mark.parametrize("memory_limit", [data_module.MEMORY_LIMIT, 100])
def test_no_epoch_trains_on_a_held_out_image(memory_limit, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", memory_limit)
    data = load(write_numbered(tmp_path / "a.npz", 50), batch_size=4)
    held_out = set(whole(data.held_out)[1].tolist())
    assert len(held_out) == 6
    assert (data.train.samples, len(data.train)) == (44, 11)
    for epoch in range(2):
        assert set(whole(data.train, epoch)[1].tolist()) == set(range(50)) - held_out


def test_held_out_images_are_prepared_as_evaluation_images_are(tmp_path):
    images = pixels(50, 6, 5, 3)
    labels = np.arange(50)
    path = write_npz(
        tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    data = load(path, pad=2, flip=True)
    inputs, targets = whole(data.held_out)
    assert torch.equal(inputs, whole(data.val)[0][targets])
    assert data.train.data is data.held_out.data, "the images are decoded once"  # type: ignore[attr-defined]


def test_held_out_photographs_are_not_cropped_at_random(tmp_path):
    write_folder(tmp_path, size=(150, 140), each=8)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    data = load(tmp_path, batch_size=4)
    inputs, _ = whole(data.held_out)
    _, indices = split_held_out(16, 0)
    assert torch.equal(inputs, whole(data.val)[0][indices])
    assert data.train.samples == 14


def test_fewer_than_8_images_are_held_out_plain_and_trained_on(tmp_path):
    path = write_numbered(tmp_path / "a.npz", 7, y_test=np.zeros(7, int))
    data = load(path, pad=2, flip=True)
    assert (data.train.samples, data.held_out.samples) == (7, 7)
    assert whole(data.held_out)[1].tolist() == list(range(7))
    assert data.note.startswith("7 train and 7 evaluation images")


def test_normalized_images_are_held_out_unchanged(tmp_path):
    images = np.random.default_rng(0).normal(size=(16, 2, 4, 4)).astype(np.float32)
    labels = np.arange(16)
    path = write_npz(
        tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    data = load(path, batch_size=8)
    inputs, targets = whole(data.held_out)
    assert torch.equal(inputs, torch.from_numpy(images)[targets])
    assert (data.train.samples, data.held_out.samples) == (14, 2)
    assert "14 train, 2 held-out and 16 evaluation images" in data.note


FACTORY = """
import torch
from torch.utils.data import DataLoader, TensorDataset

class Numbers:
    def __len__(self): return 40
    def __getitem__(self, index): return torch.tensor([float(index)]), index

x = torch.arange(40)
tensors = TensorDataset(x[:, None].float(), x)

def in_memory(): return {"train": tensors, "val": tensors}
def read(): return {"train": Numbers(), "val": tensors}
def ready(): return {"train": DataLoader(tensors, batch_size=3, shuffle=True), "val": tensors}
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "own_data.py").write_text(FACTORY)
    return f"{tmp_path / 'own_data.py'}:"


@pytest.mark.parametrize("name", ["in_memory", "read"])
def test_data_sets_of_a_factory_hold_out_the_same_samples(name, factory):
    data = load(factory + name, seed=5, batch_size=7)
    train, held_out = split_held_out(40, 5)
    assert whole(data.held_out)[1].tolist() == held_out.tolist()
    assert whole(data.train)[1].sort().values.tolist() == train.tolist()
    assert data.note.startswith("35 train, 5 held-out and 40 evaluation samples from")


def test_ready_batches_hold_out_the_first_samples_of_a_pass_of_its_own(factory):
    data = load(factory + "ready")
    assert data.train.samples == 40
    inputs, targets = whole(data.held_out)
    assert [len(target) for _, target in data.held_out.epoch(0)] == [3, 2]
    assert targets.unique().shape == (5,)
    assert torch.equal(inputs[:, 0].long(), targets)
    assert not torch.equal(targets, whole(data.train)[1][:5])
    assert torch.equal(targets, whole(load(factory + "ready").held_out, epoch=3)[1])
    assert data.note.startswith("40 train (5 of them also held-out) and 40 evaluation samples")


def test_a_network_that_changes_its_input_leaves_held_out_ready_batches_as_they_are():
    loader = DataLoader([(torch.ones(2), index) for index in range(16)], batch_size=4)
    held_out = ReadyBatches(loader, CPU, seed=0).held_out()
    before = list(held_out.epoch(0))
    for inputs, _ in held_out.epoch(0):
        inputs.zero_()
    assert same_batches(list(held_out.epoch(0)), before)


@pytest.mark.parametrize("kind", ["images", "in_memory", "read", "ready"])
def test_processes_share_the_held_out_samples(kind, factory, tmp_path):
    source = write_numbered(tmp_path / "a.npz", 100) if kind == "images" else factory + kind
    section = DataSection(source=str(source), batch_size=6, workers=0)

    def held_out(shard: Shard) -> Batches:
        return load_data(section, seed=0, device=CPU, shard=shard).held_out

    shards = [held_out(Shard(rank, 2)) for rank in range(2)]
    parts = [whole(shard)[1].tolist() for shard in shards]
    samples = whole(held_out(Shard()))[1].tolist()
    assert sorted(parts[0] + parts[1]) == sorted(samples)
    assert {shard.samples for shard in shards} == {len(samples)}


def test_a_fingerprint_covers_held_out_samples(tmp_path):
    _, held_out = split_held_out(50, 0)
    images, labels = pixels(50, 6, 5, 3), np.arange(50) % 3
    others = {"y_train": labels, "x_test": images, "y_test": labels}
    before = load(write_npz(tmp_path / "a.npz", x_train=images, **others)).fingerprint()
    changed = images.copy()
    changed[held_out[0], 0, 0, 0] ^= 1
    after = load(write_npz(tmp_path / "a.npz", x_train=changed, **others)).fingerprint()
    assert before != after
