"""The augmentation that a model was trained with is detected from the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_files import load, pixels, write_npz

from ddqcli.training.detect_augmentation import detect_padding_fill, is_flip_invariant


@pytest.mark.parametrize("trained_with", ["black", "mean"])
def test_padding_is_detected_from_batch_norm_statistics(tmp_path, trained_with):
    images, labels = pixels(256, 12, 12, 3) // 2 + 100, np.arange(256)
    path = write_npz(
        tmp_path / "a.npz", x_train=images, x_test=images, y_train=labels, y_test=labels
    )
    norms = [torch.nn.BatchNorm2d(8, momentum=None) for _ in range(2)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norms[0], torch.nn.ReLU(), norms[1])
    for inputs, _ in load(path, pad=3, fill=trained_with, batch_size=64).train.epoch(1):
        model.train()(inputs)
    data = load(path, pad=3, batch_size=64)
    before = next(iter(data.train.epoch(0)))[0]
    assert detect_padding_fill(model.eval(), data) == trained_with
    assert torch.equal(next(iter(data.train.epoch(0)))[0], before)
    assert (
        detect_padding_fill(model, load(path, pad=0))
        is detect_padding_fill(torch.nn.Flatten(), data)
        is None
    )


@pytest.mark.parametrize(
    ("axis", "flip_invariant"), [(0, True), (1, False)], ids=["above or below", "left or right"]
)
def test_flip_invariance_is_detected_from_training_images(tmp_path, axis, flip_invariant):
    """Images with one bright half, and a network that says which half it is."""
    labels = np.arange(64) % 2
    images = np.zeros((64, 6, 6, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        np.moveaxis(image, axis, 0)[3 * label :][:3] = 200
    path = write_npz(
        tmp_path / "a.npz", x_train=images, x_test=images[:7], y_train=labels, y_test=labels[:7]
    )
    halves = torch.nn.AvgPool2d((3, 6) if axis == 0 else (6, 3))
    data = load(path, pad=0, mean=[0.5], std=[0.5])
    model = torch.nn.Sequential(halves, torch.nn.Flatten())
    assert (
        is_flip_invariant(model, data)
        == is_flip_invariant(model, data, labels=False)
        == flip_invariant
    )
    swapped = write_npz(
        tmp_path / "b.npz", x_train=images, x_test=images[:7], y_train=1 - labels, y_test=labels[:7]
    )
    wrong = load(swapped, pad=0, mean=[0.5], std=[0.5])
    assert is_flip_invariant(model, wrong, labels=False) == flip_invariant
