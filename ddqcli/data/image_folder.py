"""Data in a folder: train/ and val/ (or test/) with one folder of images for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from ddqcli.data.source import Source, list_names
from ddqcli.errors import DataError

# PIL would start another program for some others, such as Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


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


class _Images(ImageFolder):  # type: ignore[misc]  # torchvision comes without types
    """An ImageFolder of regular files that enters no folder of a class twice, and no hidden one.

    torchvision follows links, so it counts a folder that links to its parent again and again.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = _class_names(Path(directory))
        return list(names), {name: label for label, name in enumerate(names)}

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Any = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        return [
            (path, class_to_idx[name])
            for name in sorted(class_to_idx)
            for path in _files(os.path.join(directory, name), set())
            if has_file_allowed_extension(path, IMG_EXTENSIONS)
        ]


def _files(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the regular files in a folder and then below it, in the order of names; none hidden."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if not _is_hidden(e.name)), key=lambda e: e.name)
    yield from (entry.path for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry.path, visited)


def _class_names(split: Path) -> tuple[str, ...]:
    names = tuple(sorted(e.name for e in split.iterdir() if e.is_dir() and not _is_hidden(e.name)))
    if not names:
        raise DataError(f"{split} holds no class folders; give each class a folder of its images.")
    return names


def _open_split(split: Path) -> ImageFolder:
    """Return the images of a split, in their own color mode; classes are sorted by name."""
    images = _Images(str(split), loader=_open_image, allow_empty=True)
    labels = {label for _, label in images.samples}
    empty = [name for name, label in images.class_to_idx.items() if label not in labels]
    if empty:
        raise DataError(
            f"{split} holds no images of {list_names(empty)}; add them or remove the empty folders."
        )
    return images


def _is_hidden(name: str) -> bool:
    """True for what tools leave behind, such as .ipynb_checkpoints and ._photo.jpg."""
    return name.startswith(".")


def _open_image(path: str) -> Image.Image:
    """Return an image as a viewer shows it: a camera may have stored it turned."""
    with Image.open(path, formats=_FORMATS) as image:
        image.load()
        turned = ImageOps.exif_transpose(image)
    return turned
