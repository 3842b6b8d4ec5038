"""Size, color mode and normalization follow the recipe, its weights, or the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_files import load, pixels, write_folder
from PIL import Image
from torchvision.models import get_weight

from ddqcli.errors import DataError, UsageError


def test_large_images_are_resized_and_cropped_as_their_weights_need(tmp_path):
    write_folder(tmp_path, size=(300, 260), each=2)
    data = load(tmp_path, weights="ResNet18_Weights.IMAGENET1K_V1", flip=True, batch_size=2)
    preset = get_weight("ResNet18_Weights.IMAGENET1K_V1").transforms()
    files = sorted((tmp_path / "val").glob("*/*.png"))
    got = torch.cat([inputs for inputs, _ in data.val.epoch(0)])
    assert (got - torch.stack([preset(Image.open(file)) for file in files])).abs().max() < 1e-5
    assert [tuple(inputs.shape) for inputs, _ in data.train.epoch(0)] == [(2, 3, 224, 224)] * 2
    assert "resized to 256, 224x224" in data.note
    assert "crops of random size and place and flips" in data.note


def test_named_weights_give_mean_and_std_and_the_recipe_may_set_the_size(tmp_path):
    write_folder(tmp_path, size=(300, 260), each=1)
    note = load(
        tmp_path, weights="ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", resize=160, crop=144
    ).note
    assert "resized to 160, 144x144" in note
    with pytest.raises(UsageError, match="has its own mean and std"):
        load(tmp_path, weights="ResNet18_Weights.IMAGENET1K_V1", mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UsageError, match=r"ResNet18_Weights\.NONE is not known"):
        load(tmp_path, weights="ResNet18_Weights.NONE")


def test_mixed_sizes_can_be_resized_and_cropped_to_one(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(pixels(20, 30, 3)).save(tmp_path / "train" / "ant" / "0.png")
    with pytest.raises(
        DataError,
        match=r"where others are .*; bring all to one size with data.resize and data.crop",
    ):
        load(tmp_path)
    inputs, _ = next(load(tmp_path, resize=5, crop=4).train.epoch(0))
    assert inputs.shape == (6, 3, 4, 4)


def test_gray_images_keep_one_channel_or_become_three_on_request(tmp_path):
    write_folder(tmp_path, mode="L")
    with pytest.raises(DataError, match=r"--set data\.mean="):
        load(tmp_path)
    inputs, _ = next(load(tmp_path, mean=[0.25], std=[0.5]).val.epoch(0))
    image = np.array(Image.open(tmp_path / "val" / "ant" / "0.png"))
    assert np.abs(inputs[0, 0].numpy() - (image / 255 - 0.25) / 0.5).max() < 1e-6
    data = load(tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    inputs, _ = next(data.val.epoch(0))
    assert inputs.shape == (6, 3, 5, 6)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    assert "gray read as RGB" in data.note


def test_one_mean_is_that_of_every_channel(tmp_path):
    write_folder(tmp_path)
    data = load(tmp_path, mean=[0.25], std=[0.5])
    inputs, _ = next(data.val.epoch(0))
    image = np.array(Image.open(tmp_path / "val" / "ant" / "0.png"))
    assert np.abs(inputs[0].numpy().transpose(1, 2, 0) - (image / 255 - 0.25) / 0.5).max() < 1e-6
    assert "mean 0.25 0.25 0.25, std 0.5 0.5 0.5" in data.note


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 5, "resize": 4}, "data.crop=5 is larger than data.resize=4"),
        ({"crop": 9}, "0.png is 6x5, less than data.crop=9; set data.resize"),
        ({"mean": [0.5] * 2, "std": [1] * 2}, "is in color .3 channels., but .* 2 values"),
    ],
)
def test_settings_that_do_not_fit_the_images(fields, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(write_folder(tmp_path), **fields)


def test_a_color_image_among_gray_ones_is_named(tmp_path):
    write_folder(tmp_path, mode="L", each=60)
    Image.fromarray(pixels(5, 6, 3)).save(tmp_path / "train" / "ant" / "1.png")
    with pytest.raises(DataError, match=r"in color"):
        load(tmp_path, mean=[0.5], std=[0.5])
