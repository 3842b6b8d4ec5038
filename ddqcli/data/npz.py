"""Data in a .npz file: images and labels of both splits as arrays."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from ddqcli.data.source import Source, list_names
from ddqcli.errors import DataError

_KEYS = {  # of images and labels; the second pair in each line is MedMNIST's
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (
        *(("x_val", "y_val"), ("val_images", "val_labels")),
        *(("x_test", "y_test"), ("test_images", "test_labels")),
    ),
}


class ArrayImages:
    """Arrays uint8 [N, H, W] or [N, H, W, 3] and labels [N] as a set of (PIL image, label)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_npz(path: Path) -> Source:
    """Open x_train, y_train and x_val, y_val (or x_test, y_test; or MedMNIST's names) of `path`.

    Images are uint8 [N, H, W] or [N, H, W, 3], or float [N, C, H, W] that are already normalized.
    Labels are integers [N] from 0 on. Raises DataError for anything else.
    """
    arrays = _read(path)
    train_keys, val_keys = (_find_keys(path, arrays, split) for split in _KEYS)
    train_images, train_labels = _check_arrays(path, train_keys, arrays)
    val_images, val_labels = _check_arrays(path, val_keys, arrays)
    count = int(train_labels.max()) + 1
    if len(np.unique(train_labels)) < 2:
        raise DataError(f"{path}: {train_keys[1]} holds a single class; at least two are needed.")
    if val_labels.max() >= count:
        raise DataError(
            f"{path}: {val_keys[1]} holds the label {val_labels.max()}, {train_keys[1]} none above "
            f"{count - 1}."
        )
    return Source(
        train=_as_dataset(train_images, train_labels),
        val=_as_dataset(val_images, val_labels),
        location=f"{path} ({val_keys[0]} for evaluation)",
        count=count,
        keep_size=True,
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays with a key in _KEYS; others only by name, for messages."""
    known = {key for pairs in _KEYS.values() for pair in pairs for key in pair}
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] if key in known else np.empty(0) for key in file.files}
    except FileNotFoundError as error:
        raise DataError(f"The data {path} does not exist.") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except DataError:
        raise
    except Exception as error:  # damaged bytes make zipfile and numpy raise nearly anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(
            f"{path} cannot be read as a .npz without pickled objects: {reason}."
        ) from error


def _check_size(path: Path) -> None:
    """Refuse a pipe, and a file whose arrays, unpacked, exceed the memory of this machine."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} cannot be read: it is no regular file.")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if unpacked > memory:
        raise DataError(
            f"{path} claims to hold {unpacked:,} bytes, and the memory {memory:,}; give a factory "
            "instead."
        )


def _find_keys(path: Path, arrays: dict[str, np.ndarray], split: str) -> tuple[str, str]:
    """Return the names of a split's images and labels."""
    for images, labels in _KEYS[split]:
        if images in arrays and labels in arrays:
            return images, labels
    wanted = " or ".join("/".join(pair) for pair in _KEYS[split])
    raise DataError(
        f"{path} holds {list_names(arrays)}; {wanted} is expected for the {split} images."
    )


def _check_arrays(
    path: Path, keys: tuple[str, str], arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return images, and labels int64 [N], of a split."""
    images_key, labels_key = keys
    images = arrays[images_key]
    labels = _check_labels(path, labels_key, arrays[labels_key])
    if images.ndim == 0 or len(images) != len(labels):
        raise DataError(
            f"{path}: {images_key} is {_describe(images)} but {labels_key} holds {len(labels)} "
            "labels."
        )
    if len(labels) == 0:
        raise DataError(f"{path}: {images_key} holds no images.")
    if labels.min() < 0:
        raise DataError(
            f"{path}: {labels_key} holds the label {labels.min()}; labels count from 0."
        )
    return _check_images(path, images_key, images), labels


def _check_labels(path: Path, key: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST's shape
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{path}: {key} is {_describe(labels)}; whole numbers [N] are expected, one for each "
            "image."
        )
    return labels.astype(np.int64)


def _check_images(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    """Return uint8 [N, H, W] or [N, H, W, 3], or float [N, C, H, W]."""
    if images.dtype == np.uint8 and images.ndim == 3:
        return images
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3):
        return images[..., 0] if images.shape[3] == 1 else images
    if images.dtype.kind != "f" or images.ndim != 4:
        raise DataError(
            f"{path}: {key} is {_describe(images)}; expected are uint8 images [N,H,W] or "
            "[N,H,W,3], or float images [N,C,H,W], normalized already."
        )
    if not np.isfinite(images).all():
        raise DataError(f"{path}: {key} holds values that are not finite.")
    return images


def _as_dataset(images: np.ndarray, labels: np.ndarray) -> Any:
    if images.dtype == np.uint8:
        return ArrayImages(images, labels)
    return TensorDataset(torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels))


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
