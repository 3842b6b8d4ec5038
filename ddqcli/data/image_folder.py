"""Data in a folder: train/ and val/ (or test/) with one folder of images for each class."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from ddqcli.data.source import Source, list_names
from ddqcli.errors import DataError


def open_folder(root: Path) -> Source:
    """Open the images in `root`.

    Raises DataError if a split or class is missing or empty, or if the splits' classes differ.
    """
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    val = next((name for name in ("val", "test") if name in folders), None)
    if "train" not in folders or val is None:
        raise DataError(
            f"{root} holds {list_names(folders) if folders else 'no folders'}; it must hold train/ "
            "and val/ (or test/) with a folder for each class."
        )
    classes, val_classes = (_class_names(root / split) for split in ("train", val))
    if classes != val_classes:
        difference = sorted(set(classes) ^ set(val_classes))
        raise DataError(
            f"{root}: train/ and {val}/ differ in their classes: {list_names(difference)} "
            "only in one of them."
        )
    if len(classes) < 2:
        raise DataError(
            f"{root / 'train'} holds a single class, {classes[0]}; at least two are needed."
        )
    return Source(
        train=_open_split(root / "train"),
        val=_open_split(root / val),
        location=f"{root} ({val}/ for evaluation)",
        classes=classes,
        count=len(classes),
    )


def _class_names(split: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in split.iterdir() if entry.is_dir()))
    if not names:
        raise DataError(f"{split} holds no class folders; give each class a folder of its images.")
    return names


def _open_split(split: Path) -> ImageFolder:
    """Return the images of a split, in their own color mode; classes are sorted by name."""
    images = ImageFolder(str(split), loader=_open_image, allow_empty=True)
    labels = {label for _, label in images.samples}
    empty = [name for name, label in images.class_to_idx.items() if label not in labels]
    if empty:
        raise DataError(
            f"{split} holds no images of {list_names(empty)}; add them or remove the empty folders."
        )
    return images


def _open_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image
