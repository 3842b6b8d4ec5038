"""Arrays of .npz files are found by either set of names, and their faults named."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from image_files import load, pixels, rng, write_npz

from ddqcli.errors import DataError


@pytest.mark.parametrize(
    "names", [("x_test", "y_test"), ("x_val", "y_val"), ("val_images", "val_labels")]
)
def test_npz_by_either_set_of_names(names, tmp_path):
    images, train = pixels(4, 8, 8), "train_images" if "images" in names[0] else "x_train"
    arrays: dict[str, Any] = {"x_train": None, "y_train": None, "x_test": None, "y_test": None}
    arrays |= {
        train: pixels(6, 8, 8),
        train.replace("x_", "y_").replace("images", "labels"): np.arange(6)[:, None] % 2,
    }
    arrays |= {names[0]: images, names[1]: np.array([[1], [0], [0], [1]], dtype=np.uint8)}
    data = load(write_npz(tmp_path / "a.npz", **arrays), mean=[0.5], std=[0.5])
    ((inputs, targets),) = data.val.epoch(0)
    assert torch.equal(inputs, (torch.from_numpy(images)[:, None].float() / 255 - 0.5) / 0.5)
    assert targets.tolist() == [1, 0, 0, 1]
    assert "of 2 classes" in data.note
    assert f"({names[0]} for evaluation), 8x8, gray" in data.note


def test_float_images_are_passed_on_unchanged(tmp_path):
    images = rng.normal(size=(8, 2, 4, 4))
    path = write_npz(
        tmp_path / "a.npz", x_train=images, y_train=np.arange(8), x_test=images, y_test=np.arange(8)
    )
    data = load(path, batch_size=8)
    ((inputs, targets),) = data.train.epoch(0)
    assert torch.equal(inputs, torch.from_numpy(images).float()[targets])
    assert "not normalized, not augmented" in data.note


def test_npz_keeps_the_size_of_large_images(tmp_path):
    path = write_npz(
        tmp_path / "a.npz", x_train=pixels(30, 140, 140, 3), x_test=pixels(7, 140, 140, 3)
    )
    inputs, _ = next(load(path).val.epoch(0))
    assert inputs.shape == (7, 3, 140, 140)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "holds y_train, x_test, y_test; x_train/y_train or"),
        (
            {"y_train": np.arange(29)},
            r"x_train is uint8 \[30, 6, 5, 3\] but y_train holds 29 labels",
        ),
        ({"y_train": np.zeros(30)}, r"y_train is float64 \[30\]; whole numbers \[N\] are expected"),
        (
            {"y_train": np.zeros((30, 4), int)},
            r"y_train is int64 \[30, 4\]; whole numbers \[N\] are expected",
        ),
        ({"y_train": np.zeros(30, int)}, "y_train holds a single class"),
        ({"y_train": np.arange(30) - 1}, "y_train holds the label -1; labels count from 0"),
        ({"y_test": np.arange(7)}, "y_test holds the label 6, y_train none above 2"),
        ({"x_train": pixels(0, 6, 5, 3), "y_train": np.zeros(0, int)}, "x_train holds no images"),
        (
            {"x_train": pixels(30, 3, 6, 5)},
            r"x_train is uint8 \[30, 3, 6, 5\]; expected are uint8 images",
        ),
        (
            {"x_train": np.zeros((30, 6, 5, 3), int)},
            r"x_train is int64 .* expected are uint8 images",
        ),
        ({"x_train": np.full((30, 3, 6, 5), np.nan)}, "x_train holds values that are not finite"),
        (
            {"x_train": np.array([{}] * 30, dtype=object)},
            "cannot be read as a .npz without pickled objects",
        ),
        ({"x_test": pixels(7, 8, 8, 3)}, "is 8x8 where others are 5x6"),
    ],
)
def test_faulty_npz(change, message, tmp_path):
    path = write_npz(tmp_path / "a.npz", **change)
    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize("size", [0, 10, 400, -30])
def test_truncated_npz(size, tmp_path):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a.npz cannot be read as a .npz"):
        load(path)


def test_damaged_and_mistaken_npz(tmp_path):
    compressed = io.BytesIO()
    np.savez_compressed(
        compressed, x_train=np.zeros((30, 6, 5, 3), np.uint8), y_train=np.arange(30)
    )
    broken = bytearray(compressed.getvalue())
    broken[60:90] = bytes(30)
    (tmp_path / "broken.npz").write_bytes(broken)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("broken.npz", "array.npz"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a .npz"):
            load(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "absent.npz")
