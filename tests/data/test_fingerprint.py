"""Fingerprints differ for other data, and only for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_files import CPU, load, pixels, write_npz
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddqcli.data.batches import BatchOrder
from ddqcli.data.loaded_batches import LoadedBatches
from ddqcli.data.memory_batches import MemoryBatches
from ddqcli.data.ready_batches import ReadyBatches


def test_a_fingerprint_differs_for_other_data_in_a_file(tmp_path):
    usual = {"x_train": pixels(30, 6, 5, 3), "x_test": pixels(7, 6, 5, 3)}
    one_pixel, swapped = (usual["x_train"].copy() for _ in range(2))
    one_pixel[17, 3, 2, 1] ^= 1
    swapped[[4, 5]] = swapped[[5, 4]]
    changes = [{}, {"x_train": one_pixel}, {"x_train": swapped}, {"y_test": np.arange(7) % 2}]
    prints = [
        load(write_npz(tmp_path / "a.npz", **{**usual, **change})).fingerprint()
        for change in changes
    ]
    assert len(set(prints)) == 4
    again = load(write_npz(tmp_path / "b.npz", **usual), seed=5, batch_size=3, flip=False)
    assert again.fingerprint() == prints[0], "which hangs on the data alone"


@pytest.mark.parametrize("kind", ["memory", "read", "two workers", "ready"])
def test_a_fingerprint_tolerates_changes_in_the_last_bits_only(kind):
    def batches(images: Tensor, targets: Tensor) -> Any:
        order, pairs = BatchOrder(len(images), 8), list(zip(images, targets, strict=True))
        if kind == "memory":
            return MemoryBatches((images, targets), order, CPU)
        if kind == "ready":
            return ReadyBatches(DataLoader(pairs, 50, shuffle=True), CPU, seed=0)
        return LoadedBatches(pairs, order, CPU, seed=0, workers=2 if kind == "two workers" else 0)

    images, targets = torch.randn(50, 3, 4, 4), torch.arange(50) % 3
    images -= images.mean()
    print_ = batches(images, targets).fingerprint()
    assert batches(images * (1 + 1e-6) + 1e-8, targets).fingerprint() == print_
    for other in ((images.roll(1, 0), targets), (images * 1.1, targets), (images, targets.roll(1))):
        assert batches(*other).fingerprint() != print_


def test_samples_that_differ_at_each_reading_have_no_fingerprint():
    class Drawn(Dataset):
        def __init__(self, seed: int) -> None:
            self.random = np.random.default_rng(seed)  # which no seeding from outside reaches

        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.from_numpy(self.random.normal(size=4)), index % 3

    def print_(seed: int) -> str:
        return LoadedBatches(Drawn(seed), BatchOrder(9, 3), CPU, seed=0, workers=0).fingerprint()

    assert print_(1) == print_(2)
