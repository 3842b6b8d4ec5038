"""Images of a source as uint8 arrays of one size: which size and colours, and how each one is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import DatasetFolder
from torchvision.models import get_weight
from torchvision.transforms import InterpolationMode, v2

from ddqcli.data.sources import Source
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import IMAGENET_MEAN, IMAGENET_STD, DataSection

SMALL_SIDE = 128  # pixels; larger images are photographs, trained on by crops of random size
GREY, COLOUR = (
    ("1", "L", "LA"),
    ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"),
)  # PIL's modes of 8 bits a channel
PROBED = 32  # images of each split that are looked at to learn their size and colours


@dataclass(frozen=True)
class ImageFormat:
    """What images are turned into."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str  # L or RGB
    resize: int | None  # the shorter side
    crop: int | None  # at the centre
    shape: tuple[int, int]  # height and width that result
    interpolation: InterpolationMode
    widened: bool  # grey images, read as RGB

    @property
    def small(self) -> bool:
        return min(self.shape) <= SMALL_SIDE

    @property
    def bytes(self) -> int:
        """Of one image, decoded."""
        return self.shape[0] * self.shape[1] * len(self.mode)


class Reader:
    """A map-style set of (uint8 [H,W,C], label) over one of (PIL image, label). Raises DataError, naming the image."""

    def __init__(self, items: Any, form: ImageFormat, *, random_crop: bool = False) -> None:
        self.items, self.form, self.random_crop = items, form, random_crop
        steps: list[Callable[[Image.Image], Image.Image]] = []
        if random_crop:
            steps = [v2.RandomResizedCrop(form.shape, interpolation=form.interpolation)]
        else:
            steps += [v2.Resize(form.resize, form.interpolation)] if form.resize else []
            steps += [v2.CenterCrop(form.crop)] if form.crop else []
        self.transform = v2.Compose(steps) if steps else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = fetch(self.items, index)
        if self.form.mode == "L" and image.mode not in GREY:
            raise DataError(
                f"{_name(self.items, index)} is in colour where others are grey; convert one or the other."
            )
        if image.mode != self.form.mode:
            image = image.convert(self.form.mode)
        if (
            not self.random_crop
            and not self.form.resize
            and self.form.crop
            and min(image.size) < self.form.crop
        ):
            size = f"{image.width}x{image.height}, less than data.crop={self.form.crop}"
            raise DataError(f"{_name(self.items, index)} is {size}; set data.resize.")
        pixels = np.array(self.transform(image) if self.transform else image)
        if pixels.shape[:2] != self.form.shape:
            raise _mixed(_name(self.items, index), pixels.shape[:2], self.form.shape)
        return pixels.reshape(*self.form.shape, -1), label


def fetch(items: Any, index: int) -> tuple[Image.Image, int]:
    """Image `index` and its label. Raises DataError where either is not what it should be."""
    try:
        image, label = items[index]
    except (
        Exception
    ) as error:  # PIL raises OSError, SyntaxError, ValueError and more on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{_name(items, index)} cannot be read: {reason}; replace or remove it."
        ) from error
    if not isinstance(image, Image.Image) or image.mode not in GREY + COLOUR:
        kind = (
            f"of mode {image.mode}"
            if isinstance(image, Image.Image)
            else f"a {type(image).__name__}"
        )
        raise DataError(
            f"{_name(items, index)} is {kind}; images of 8 bits a channel are needed, or a data factory."
        )
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        kind = type(label).__name__
        raise DataError(
            f"{_name(items, index)} has a {kind} as label; whole numbers are needed, or a data factory."
        )
    return image, int(label)


def _name(items: Any, index: int) -> str:
    return str(items.samples[index][0]) if isinstance(items, DatasetFolder) else f"Image {index}"


def _mixed(name: str, shape: tuple[int, ...], other: tuple[int, int]) -> DataError:
    sizes = f"{name} is {shape[1]}x{shape[0]} where others are {other[1]}x{other[0]}"
    return DataError(f"{sizes}; bring all to one size with data.resize and data.crop.")


def decode(reader: Reader) -> tuple[Tensor, Tensor]:
    """All images as uint8 [N,H,W,C] and their labels [N]; threads help, as PIL decodes outside the interpreter."""
    count = len(reader)
    images = np.empty((count, *reader.form.shape, len(reader.form.mode)), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)

    def fill(start: int) -> None:
        for index in range(start, min(start + 64, count)):
            images[index], labels[index] = reader[index]

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(fill, range(0, count, 64)):
            pass
    return torch.from_numpy(images), torch.from_numpy(labels)


def choose_format(source: Source, section: DataSection) -> ImageFormat:
    """Size, colours and normalisation: the section's word, then that of its weights, then what the images show.

    Images of one size up to 128 pixels stay as they are; larger ones are resized to 256 and cropped to 224.
    Raises DataError where images and section do not fit together, UsageError on unknown weights.
    """
    section, interpolation = _with_weights(section)
    sizes, grey = _probe(source)
    resize, crop = section.resize, section.crop
    if not source.sized and statistics.median(min(size) for size in sizes.values()) > SMALL_SIDE:
        crop = crop or min(224, resize or 224)
        resize = resize or max(256, crop)
    if resize and crop and crop > resize:
        raise DataError(
            f"data.crop={crop} is larger than data.resize={resize}; make it {resize} or less."
        )
    shapes = {name: _shape(size, resize, crop) for name, size in sizes.items()}
    shape = next(iter(shapes.values()))
    for name, other in shapes.items():
        if other != shape:
            raise _mixed(name, other, shape)
    widened = _widened(source, grey, section)
    mode = "L" if grey and not widened else "RGB"
    return ImageFormat(
        tuple(section.mean), tuple(section.std), mode, resize, crop, shape, interpolation, widened
    )


def _with_weights(section: DataSection) -> tuple[DataSection, InterpolationMode]:
    """The section with what it leaves open filled from the torchvision weights it names, and how to interpolate."""
    if section.weights is None:
        return section, InterpolationMode.BILINEAR
    try:
        preset: Any = get_weight(section.weights).transforms()
        resize, crop, mean, std = (
            preset.resize_size[0],
            preset.crop_size[0],
            list(preset.mean),
            list(preset.std),
        )
    except (ValueError, KeyError, AttributeError) as error:
        hint = "name those of a torchvision classifier, such as ResNet18_Weights.IMAGENET1K_V1"
        raise UsageError(f"data.weights={section.weights} is not known; {hint}.") from error
    if (section.mean, section.std) not in ((mean, std), (list(IMAGENET_MEAN), list(IMAGENET_STD))):
        raise UsageError(
            f"data.weights={section.weights} has its own mean and std; leave out data.mean and data.std."
        )
    filled = {
        "mean": mean,
        "std": std,
        "resize": section.resize or resize,
        "crop": section.crop or crop,
    }
    return section.model_copy(update=filled), preset.interpolation


def _probe(source: Source) -> tuple[dict[str, tuple[int, int]], bool]:
    """Width and height of some images of both splits by name, and whether all of them are grey."""
    sizes, grey = {}, True
    for split, items in (("train", source.train), ("evaluation", source.val)):
        if len(items) == 0:
            raise DataError(f"{source.place} holds no {split} images.")
        for index in sorted({round(k * (len(items) - 1) / (PROBED - 1)) for k in range(PROBED)}):
            image, _ = fetch(items, index)
            sizes[f"{_name(items, index)} ({split})"] = image.size
            grey = grey and image.mode in GREY
    return sizes, grey


def _shape(size: tuple[int, int], resize: int | None, crop: int | None) -> tuple[int, int]:
    """Height and width of an image of width and height `size` once resized and cropped."""
    if crop:
        return crop, crop
    if resize:
        height, width = v2.functional.resize(torch.empty(1, size[1], size[0]), [resize]).shape[1:]
        return height, width
    return size[1], size[0]


def _widened(source: Source, grey: bool, section: DataSection) -> bool:
    """Whether grey images are to be read as RGB: only where three values were chosen for them, not left at default."""
    given = len(section.mean)
    if given == (1 if grey else 3):
        return False
    if not grey or given != 3:
        has = "is grey (1 channel)" if grey else "is in colour (3 channels)"
        raise DataError(
            f"{source.place} {has}, but data.mean has {given} values; give one for each channel."
        )
    if section.weights is None and section.mean == list(IMAGENET_MEAN):
        raise DataError(
            f"{source.place} is grey, but data.mean has its default of 3 values; give what the model was trained with: "
            "--set data.mean='[0.5]' --set data.std='[0.5]', or three values of your own to read grey as RGB."
        )
    return True
