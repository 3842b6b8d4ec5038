"""Data sets of torchvision are opened where they lie."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import load, pixels
from PIL import Image

from ddqcli.errors import UsageError


def write_mnist(root: Path) -> np.ndarray:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = {"train": pixels(20, 28, 28), "t10k": pixels(10, 28, 28)}
    for name, array in images.items():
        head = [
            np.array([2051, *array.shape], ">i4").tobytes(),
            np.array([2049, len(array)], ">i4").tobytes(),
        ]
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head[0] + array.tobytes())
        labels = (np.arange(len(array)) % 10).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head[1] + labels.tobytes())
    return images["t10k"]


def test_torchvision_set_with_a_train_argument(tmp_path):
    images = write_mnist(tmp_path)
    data = load(f"MNIST:{tmp_path}", mean=[0.0], std=[1.0])
    ((inputs, targets),) = data.val.epoch(0)
    assert torch.equal(inputs[:, 0], torch.from_numpy(images).float() / 255)
    assert targets.tolist() == list(range(10))
    assert data.train.samples + data.held_out.samples == 20
    assert data.classes is not None
    assert len(data.classes) == 10


def test_torchvision_set_with_a_split_argument(tmp_path):
    names = {"n01": ("ant", "emmet"), "n02": ("bee",)}
    torch.save((names, []), tmp_path / "meta.bin")
    for split, wnid in itertools.product(("train", "val"), names):
        (tmp_path / split / wnid).mkdir(parents=True)
        Image.fromarray(pixels(150, 140, 3)).save(tmp_path / split / wnid / "a.jpg")
    data = load(f"ImageNet:{tmp_path}", batch_size=2)
    assert data.classes == ("ant", "bee")
    assert "(val for evaluation), resized to 256, 224x224" in data.note
    ((inputs, targets),) = data.val.epoch(0)
    assert inputs.shape == (2, 3, 224, 224)
    assert targets.tolist() == [0, 1]


def test_unknown_keyword_arguments_of_torchvision(tmp_path):
    with pytest.raises(UsageError, match="cannot be opened with"):
        load(f"CIFAR10:{tmp_path}", kwargs={"color": True})


@pytest.mark.parametrize("name", ["CIFAR10", "KMNIST", "QMNIST", "ImageNet"])
def test_a_download_is_refused_also_where_the_class_does_not_name_it(tmp_path, name):
    with pytest.raises(UsageError, match="ddq downloads nothing; fetch the data with"):
        load(f"{name}:{tmp_path}", kwargs={"download": True})
    assert not list(tmp_path.iterdir())
