"""Augmentation and normalization agree with torchvision and with float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from image_files import MEAN, STD, load, pixels, reference, write_npz
from PIL import Image

from ddqcli.data.augment import flip_images, normalize_images, random_crops
from ddqcli.recipe.schema import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize("fill", [(0, 0, 0), (124, 116, 104)], ids=str)
def test_crops_and_flips_agree_with_torchvision_for_each_sample(fill):
    images = torch.from_numpy(pixels(40, 7, 9, 3))
    tops, lefts = torch.randint(0, 7, (2, 40))
    flips = torch.rand(40) < 0.5
    color = torch.tensor(fill, dtype=torch.uint8)
    result = flip_images(random_crops(images, 3, tops, lefts, color), flips)
    for image, top, left, flip, got in zip(
        images, tops.tolist(), lefts.tolist(), flips, result, strict=True
    ):
        padded = torch.stack(
            [
                TF.pad(channel, [3], value)
                for channel, value in zip(image.permute(2, 0, 1), fill, strict=True)
            ]
        )
        expected = TF.crop(padded, top, left, 7, 9)
        expected = TF.hflip(expected) if flip else expected
        assert torch.equal(got.permute(2, 0, 1), expected)


def test_normalization_is_torchvisions_and_that_of_float64():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    result = normalize_images(images, MEAN.float(), STD.float())
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        result[1], TF.normalize(TF.to_tensor(images[1].numpy()), IMAGENET_MEAN, IMAGENET_STD)
    )
    exact = (images.double() / 255 - MEAN) / STD
    assert (result - exact.permute(0, 3, 1, 2)).abs().max() < 1e-6


def test_training_images_are_shifted_by_up_to_pad_and_flipped_on_black(tmp_path):
    shift, labels = 2, np.arange(60)
    images = pixels(60, 6, 5, 3)
    path = write_npz(tmp_path / "a.npz", x_train=images, y_train=labels)
    variants_seen = set()
    for inputs, targets in load(path, pad=shift, flip=True, batch_size=20).train.epoch(0):
        for got, target in zip(inputs, targets.tolist(), strict=True):
            padded = np.pad(images[target], ((shift, shift), (shift, shift), (0, 0)))
            matches = []
            for top, left, flip in itertools.product(range(5), range(5), (1, -1)):
                variant = padded[top : top + 6, left : left + 5][:, ::flip]
                if (reference(Image.fromarray(variant)) - got).abs().max() < 1e-6:
                    matches.append((top, left, flip))
            assert len(matches) == 1
            variants_seen.update(matches)
    assert (
        {top for top, _, _ in variants_seen}
        == {left for _, left, _ in variants_seen}
        == set(range(5))
    )
    assert {flip for _, _, flip in variants_seen} == {1, -1}


def test_without_pad_and_flip_training_images_are_whole(tmp_path):
    images = pixels(30, 6, 5, 3)
    data = load(
        write_npz(tmp_path / "a.npz", x_train=images, y_train=np.arange(30)),
        pad=0,
        flip=False,
        batch_size=30,
    )
    inputs, targets = next(data.train.epoch(0))
    for got, target in zip(inputs, targets, strict=True):
        assert (reference(Image.fromarray(images[target])) - got).abs().max() < 1e-6
    assert data.note.endswith("no augmentation")
