"""Batches repeat, resume anywhere, and do not depend on the number of workers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import CPU, load, same_batches, write_folder, write_npz
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ddqcli.data.batches import BatchOrder, Shard
from ddqcli.data.data_factory import FactoryBatches
from ddqcli.data.loaded_batches import LoadedBatches
from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.data.trees import tensors
from ddqcli.errors import DataError
from ddqcli.recipe.schema import DataSection


@pytest.mark.parametrize(("samples", "size", "batches"), [(30, 7, 4), (28, 7, 4), (5, 7, 1)])
def test_training_order_holds_each_sample_at_most_once_in_whole_batches(samples, size, batches):
    order = BatchOrder(samples, size, seed=3)
    epochs = [torch.cat(order.batches(epoch)) for epoch in (0, 1)]
    assert len(order) == len(order.batches(0)) == batches
    for indices in epochs:
        assert len(indices) == len(indices.unique()) == min(samples, batches * size)
        assert indices.min() >= 0
        assert indices.max() < samples
    assert not torch.equal(*epochs)


def test_evaluation_runs_through_every_sample_once_in_order():
    order = BatchOrder(30, 7)
    assert len(order) == 5
    assert torch.equal(torch.cat(order.batches(9)), torch.arange(30))


class Noisy(Dataset):
    """Adds noise from every global generator, as transforms do."""

    read: list[int]

    def __init__(self, length: int = 22) -> None:
        self.length, self.read = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return index + torch.rand(3) + random.random() + float(np.random.rand()), index % 3


def make_batches(kind: str, tmp_path: Path, seed: int) -> Any:
    if kind == "memory":
        return load(write_npz_once(tmp_path), seed=seed, batch_size=5).train
    if kind == "random crops":
        folder = tmp_path / "large"
        return load(
            folder if folder.exists() else write_folder(folder, size=(150, 140), each=6),
            seed,
            batch_size=3,
        ).train
    if kind == "ready":
        return ReadyBatches(DataLoader(Noisy(), batch_size=5, shuffle=True), CPU, seed=seed)
    workers = 2 if kind == "two workers" else 0
    return LoadedBatches(Noisy(), BatchOrder(22, 5, seed), CPU, seed=seed, workers=workers)


def write_npz_once(folder: Path) -> Path:
    return folder / "a.npz" if (folder / "a.npz").exists() else write_npz(folder / "a.npz")


@pytest.mark.parametrize("kind", ["memory", "random crops", "loaded", "two workers", "ready"])
def test_batches_depend_on_seed_and_epoch_alone_and_resume_anywhere(kind, tmp_path):
    torch.manual_seed(1)
    whole = list(make_batches(kind, tmp_path, 7).epoch(2))
    torch.manual_seed(2)
    random.seed(2)
    before = torch.get_rng_state()
    batches = make_batches(kind, tmp_path, 7)
    assert same_batches(list(batches.epoch(2)), whole)
    assert same_batches(list(batches.epoch(2, start=2)), whole[2:])
    assert list(batches.epoch(2, start=len(batches))) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert len(whole) == len(batches)
    assert not same_batches(list(batches.epoch(3)), whole)
    assert not same_batches(list(make_batches(kind, tmp_path, 8).epoch(2)), whole)


def test_the_number_of_workers_changes_nothing(tmp_path):
    none, two = (make_batches(kind, tmp_path, 5) for kind in ("loaded", "two workers"))
    assert same_batches(list(none.epoch(1)), list(two.epoch(1)))


def test_resuming_reads_no_earlier_sample():
    samples, order = Noisy(), BatchOrder(22, 5, seed=0)
    batches = LoadedBatches(samples, order, CPU, seed=0, workers=0)
    assert len(list(batches.epoch(0, start=3))) == 1
    assert samples.read == order.batches(0)[3].tolist()


@pytest.mark.parametrize("drop_last", [False, True])
def test_ready_batches_count_their_samples(drop_last):
    loader = DataLoader(Noisy(), batch_size=5, drop_last=drop_last)
    counted = ReadyBatches(loader, CPU, seed=0)
    passed = ReadyBatches([batch for batch in loader], CPU, seed=0)
    expected = (4, 20) if drop_last else (5, 22)
    assert (len(counted), counted.samples) == (len(passed), passed.samples) == expected


def test_samples_of_unequal_shape_cannot_be_stacked():
    ragged = [(torch.zeros(index + 1), 0) for index in range(4)]
    message = r"do not fit together: .*; give all the same parts and shapes, or return a DataLoader"
    with pytest.raises(DataError, match=message):
        list(LoadedBatches(ragged, BatchOrder(4, 4), CPU, seed=0, workers=0).epoch(0))


class Stream(IterableDataset):
    """Batches 0, 1, ... of 4 samples; without end if `batches` is None."""

    def __init__(self, batches: int | None) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        for k in itertools.count():
            if k == self.batches:
                return
            yield torch.full((4, 2), k), torch.full((4,), k)


@pytest.mark.parametrize(("batches", "numbers"), [(None, range(7)), (3, [0, 1, 2, 0, 1, 2, 0])])
def test_of_batches_without_length_an_epoch_has_the_steps_of_the_run(batches, numbers):
    stream = ReadyBatches(Stream(batches), CPU, seed=0, steps=7)
    assert (len(stream), stream.samples) == (7, 28)
    assert [int(y[0]) for _, y in stream.epoch(0)] == list(numbers)
    assert [int(y[0]) for _, y in stream.epoch(0, start=5)] == list(numbers)[5:]
    assert [len(y) for _, y in stream.held_out().epoch(0)] == [3]
    assert stream.fingerprint() == ReadyBatches(Stream(None), CPU, seed=0, steps=9).fingerprint()


def test_batches_without_length_are_counted_if_nothing_limits_the_run():
    stream = ReadyBatches(Stream(3), CPU, seed=0)
    assert (len(stream), stream.samples, stream.last_batch) == (3, 12, 4)
    loader = DataLoader(Stream(3), batch_size=None)
    assert len(ReadyBatches(loader, CPU, seed=0)) == 3
    with pytest.raises(DataError, match=r"^val, a Stream, has no length.* not all; give an end,"):
        ReadyBatches(Stream(None), CPU, seed=0, name="val", remedy="give an end")


@pytest.mark.parametrize(("samples", "size"), [(21, 5), (20, 5), (3, 5)])
def test_the_size_of_the_last_batch_is_known(samples, size):
    loader = DataLoader(Noisy(samples), batch_size=size)
    expected = len(list(loader)[-1][1])
    assert ReadyBatches(loader, CPU, seed=0).last_batch == expected
    assert ReadyBatches(list(loader), CPU, seed=0).last_batch == expected
    dropping = ReadyBatches(DataLoader(Noisy(21), batch_size=5, drop_last=True), CPU, seed=0)
    assert dropping.last_batch == 5


def test_a_batch_that_cannot_be_divided_counts_as_one_sample_and_is_for_one_process():
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]
    boxes = [torch.zeros(2, 4), torch.zeros(7, 4)]
    batches = [((images, [{"boxes": b} for b in boxes]), None)] * 10
    ready = ReadyBatches(batches, CPU, seed=0)
    assert (len(ready), ready.samples) == (10, 10)
    (inputs, targets), *_ = ready.epoch(0)
    assert [list(image.shape) for image in inputs[0]] == [[3, 4, 4], [3, 5, 4]]
    assert targets is None
    assert len(list(ready.held_out().epoch(0))) == 1
    with pytest.raises(DataError, match="differ in their first dimension"):
        next(ReadyBatches(batches, CPU, seed=0, shard=Shard(0, 2)).epoch(0))


@pytest.mark.parametrize(
    "sample",
    [
        lambda k: (torch.full((3, 2), float(k)), k),
        lambda k: (torch.full((3, 2), float(k)), torch.tensor(k)),
        lambda k: ({"a": torch.full((2,), float(k))}, torch.zeros(5)),
    ],
)
def test_samples_of_an_iterable_data_set_are_batched(sample):
    class Samples(IterableDataset):
        def __iter__(self) -> Any:
            return map(sample, itertools.count())

    section = DataSection(source="x:y", batch_size=4)
    splits = FactoryBatches("x:y", section, 0, CPU, Shard(), steps=3)
    train, _ = splits.train(Samples())
    first = tensors(next(train.epoch(0)))
    assert [x.shape[0] for x in first] == [4] * len(first)
    assert first[0].flatten(1)[:, 0].tolist() == [0, 1, 2, 3]
    assert (len(train), train.samples) == (3, 12)
    batches, _ = splits.train(Stream(None))
    assert len(next(batches.epoch(0))[1]) == 4
