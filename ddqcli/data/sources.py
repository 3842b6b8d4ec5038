"""Where data come from: image folders, .npz files, torchvision's data sets, and a user's own factory."""

from __future__ import annotations

import difflib
import inspect
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import TensorDataset

from ddqcli.errors import DataError, DDQError, UsageError


@dataclass(frozen=True)
class Source:
    """Two splits, each a map-style set of (PIL image, label), or a TensorDataset where images need no preparation."""

    train: Any
    val: Any
    place: str  # for the note: where from, and which part serves for evaluation
    classes: tuple[str, ...] | None = None  # their names, where known
    count: int | None = None  # of classes, where known
    sized: bool = False  # the images were brought to their size already: large ones are not resized unless told to


class ArrayImages:
    """Arrays uint8 [N,H,W] or [N,H,W,3] and integer labels [N] as a map-style set of (PIL image, label)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


# ---------------------------------------------------------------------------------------------------------- folders


def open_folder(root: Path) -> Source:
    """A folder with train/ and val/ (or test/), class folders inside. Raises DataError."""
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    held_out = next((name for name in ("val", "test") if name in found), None)
    if "train" not in found or held_out is None:
        inside = _some(found) if found else "no folders"
        raise DataError(
            f"{root} holds {inside}; it must hold train/ and val/ (or test/) with a folder for each class."
        )
    train, val = (_class_names(root / split) for split in ("train", held_out))
    if train != val:
        alone = sorted(set(train) ^ set(val))
        raise DataError(
            f"{root}: train/ and {held_out}/ differ in their classes: {_some(alone)} only in one of them."
        )
    if len(train) < 2:
        raise DataError(
            f"{root / 'train'} holds a single class, {train[0]}; at least two are needed."
        )
    return Source(
        train=_image_folder(root / "train"),
        val=_image_folder(root / held_out),
        place=f"{root} ({held_out}/ for evaluation)",
        classes=train,
        count=len(train),
    )


def _class_names(split: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in split.iterdir() if entry.is_dir()))
    if not names:
        raise DataError(f"{split} holds no class folders; give each class a folder of its images.")
    return names


def _image_folder(split: Path) -> torchvision.datasets.ImageFolder:
    """Classes sorted by name, images in their own colours. Raises DataError on classes without images."""
    folder = torchvision.datasets.ImageFolder(str(split), loader=_open_image, allow_empty=True)
    filled = {label for _, label in folder.samples}
    empty = [name for name, label in folder.class_to_idx.items() if label not in filled]
    if empty:
        raise DataError(
            f"{split} holds no images of {_some(empty)}; add them or remove the empty folders."
        )
    return folder


def _open_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


# ------------------------------------------------------------------------------------------------------- .npz files

_NPZ_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (
        ("x_val", "y_val"),
        ("val_images", "val_labels"),
        ("x_test", "y_test"),
        ("test_images", "test_labels"),
    ),
}


def open_npz(path: Path) -> Source:
    """A .npz with x_train, y_train and x_val, y_val (or x_test, y_test; or MedMNIST's names). Raises DataError."""
    arrays = _read_npz(path)
    parts = {}
    for split, choices in _NPZ_KEYS.items():
        pair = next((pair for pair in choices if pair[0] in arrays and pair[1] in arrays), None)
        if pair is None:
            wanted = " or ".join("/".join(pair) for pair in choices)
            raise DataError(
                f"{path} holds {_some(list(arrays))}; {wanted} is expected for the {split} images."
            )
        parts[split] = (*pair, *_checked_arrays(path, pair, arrays[pair[0]], arrays[pair[1]]))
    _, train_key, train_images, train_labels = parts["train"]
    val_name, val_key, val_images, val_labels = parts["val"]
    count = int(train_labels.max()) + 1
    if len(np.unique(train_labels)) < 2:
        raise DataError(f"{path}: {train_key} holds a single class; at least two are needed.")
    if val_labels.max() >= count:
        raise DataError(
            f"{path}: {val_key} holds the label {val_labels.max()}, {train_key} none above {count - 1}."
        )
    return Source(
        train=_as_set(train_images, train_labels),
        val=_as_set(val_images, val_labels),
        place=f"{path} ({val_name} for evaluation)",
        count=count,
        sized=True,
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays that open_npz may want, the others as empty ones (to be listed in messages)."""
    known = {key for choices in _NPZ_KEYS.values() for pair in choices for key in pair}
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(info.file_size for info in archive.infolist())
        if claimed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            raise DataError(
                f"{path} claims to hold {claimed:,} bytes, and the memory {memory:,}; give a factory instead."
            )
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


def _checked_arrays(
    path: Path, keys: tuple[str, str], images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Images, and labels [N] as int64. Raises DataError where they are not what their names promise."""
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST's shape
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{path}: {keys[1]} is {_shown(labels)}; whole numbers [N] are expected, one for each image."
        )
    if images.ndim == 0 or len(images) != len(labels):
        raise DataError(
            f"{path}: {keys[0]} is {_shown(images)} but {keys[1]} holds {len(labels)} labels."
        )
    if len(labels) == 0:
        raise DataError(f"{path}: {keys[0]} holds no images.")
    if labels.min() < 0:
        raise DataError(f"{path}: {keys[1]} holds the label {labels.min()}; labels count from 0.")
    grey_axis = images.ndim == 4 and images.shape[3] == 1
    if images.dtype == np.uint8 and (
        images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    ):
        return (images[..., 0] if grey_axis else images), labels.astype(np.int64)
    if images.dtype.kind != "f" or images.ndim != 4:
        raise DataError(
            f"{path}: {keys[0]} is {_shown(images)}; expected are uint8 images [N,H,W] or [N,H,W,3], or float images "
            "[N,C,H,W], normalised already."
        )
    if not np.isfinite(images).all():
        raise DataError(f"{path}: {keys[0]} holds values that are not finite.")
    return images, labels.astype(np.int64)


def _as_set(images: np.ndarray, labels: np.ndarray) -> Any:
    if images.dtype == np.uint8:
        return ArrayImages(images, labels)
    return TensorDataset(torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels))


# ------------------------------------------------------------------------------------------- torchvision's data sets


def is_torchvision(name: str, root: str) -> bool:
    """Whether NAME:ROOT means a data set of torchvision. Raises UsageError on a near miss."""
    if name in torchvision.datasets.__all__:
        return True
    if not all(
        part.isidentifier() for part in root.split(".")
    ):  # a folder, then, not the name of a factory
        near = difflib.get_close_matches(name, torchvision.datasets.__all__, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"torchvision has no data set {name}{hint}")
    return False


def open_torchvision(name: str, root: str, kwargs: dict[str, Any]) -> Source:
    """torchvision's data set `name` in the folder `root`, which must hold it. Raises DataError, UsageError."""
    make = getattr(torchvision.datasets, name)
    accepted = inspect.signature(make).parameters
    if "train" in accepted:
        train = _dataset(make, name, root, {**kwargs, "train": True})
        held_out, val = "its test part", _dataset(make, name, root, {**kwargs, "train": False})
    elif "split" in accepted:
        train = _dataset(make, name, root, {**kwargs, "split": "train"})
        held_out, val = _held_out(make, name, root, kwargs)
    else:
        raise UsageError(
            f"torchvision's {name} is not split into training and evaluation; give a factory instead."
        )
    names = getattr(train, "classes", None)
    classes = (
        tuple(entry if isinstance(entry, str) else entry[0] for entry in names) if names else None
    )
    return Source(
        train=train,
        val=val,
        place=f"torchvision's {name} in {root} ({held_out} for evaluation)",
        classes=classes,
        count=len(classes) if classes else None,
    )


def _held_out(
    make: Callable[..., Any], name: str, root: str, kwargs: dict[str, Any]
) -> tuple[str, Any]:
    """The split named val where the data set knows one, else test."""
    try:
        return "val", _dataset(make, name, root, {**kwargs, "split": "val"})
    except UsageError:
        return "test", _dataset(make, name, root, {**kwargs, "split": "test"})


def _dataset(make: Callable[..., Any], name: str, root: str, kwargs: dict[str, Any]) -> Any:
    downloads = "download" in inspect.signature(make).parameters
    try:
        return make(root, **kwargs, **({"download": False} if downloads else {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"torchvision's {name} cannot be opened with {kwargs}: {error}") from error
    except Exception as error:
        extra = "".join(f", {key}={value!r}" for key, value in kwargs.items())
        fetch = f"fetch it with torchvision.datasets.{name}({root!r}{extra}, download=True)"
        remedy = fetch if downloads else "torchvision's page on it says where to get it"
        reason = (
            str(error).split(". ")[0].splitlines()[0].rstrip(".")
            if str(error)
            else type(error).__name__
        )
        raise DataError(
            f"{root} does not hold torchvision's {name} ({reason}); {remedy}."
        ) from error


# ---------------------------------------------------------------------------------------------------- user factories


def call_factory(spec: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the factory gives: `train` and `val`, and where given `loss` and `metric`. Raises DataError, UsageError."""
    from ddqcli.recipe.factory import import_factory

    factory = import_factory(spec)
    try:
        made = factory(**kwargs)
    except DDQError:
        raise
    except (Exception, SystemExit) as error:
        given = f" with {kwargs}" if kwargs else ""
        raise DataError(
            f"The data factory {spec}{given} failed: {type(error).__name__}: {error}"
        ) from error
    get = made.get if isinstance(made, Mapping) else lambda key: getattr(made, key, None)
    parts = {key: get(key) for key in ("train", "val", "loss", "metric")}
    missing = [key for key in ("train", "val") if parts[key] is None]
    if missing:
        has = (
            f"a mapping with {_some(list(made))}"
            if isinstance(made, Mapping)
            else f"a {type(made).__name__}"
        )
        raise DataError(f"The data factory {spec} returned {has}; {' and '.join(missing)} missing.")
    for key in ("loss", "metric"):
        if parts[key] is not None and not callable(parts[key]):
            raise DataError(
                f"The data factory {spec} returned a {key} that is no function of (output, target)."
            )
    return parts


def _some(names: list[str]) -> str:
    """The names, or the first few of many."""
    shown = ", ".join(str(name) for name in names[:8]) or "nothing"
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
