"""Read images as uint8 arrays of one size and color mode."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import DatasetFolder
from torchvision.transforms import InterpolationMode, v2

from ddqcli.errors import DataError

SMALL_SIDE = 128  # pixels; larger images are photographs, trained on with random resized crops
GRAY_MODES = ("1", "L", "LA")  # PIL's modes of 8 bits a channel
COLOR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class ImageFormat:
    """The format that all images are converted to."""

    mean: tuple[float, ...]  # normalization: one value for each channel, of pixel values in 0..1
    std: tuple[float, ...]
    mode: str  # L or RGB
    resize: int | None  # pixels of the shorter side
    crop: int | None  # pixels of the center crop
    shape: tuple[int, int]  # resulting height and width
    interpolation: InterpolationMode
    gray_as_rgb: bool  # gray images are converted to RGB

    @property
    def small(self) -> bool:
        """True for images that are kept whole but for a crop after padding."""
        return min(self.shape) <= SMALL_SIDE

    @property
    def bytes(self) -> int:
        """Size of one decoded image."""
        return self.shape[0] * self.shape[1] * len(self.mode)


class ImageReader:
    """A map-style data set of (uint8 [H, W, C], label) over one of (PIL image, label).

    With `random_crop`, a random resized crop (torchvision's) replaces resize and center crop.
    Raises DataError, naming the image, if one cannot be read or has another size.
    """

    def __init__(
        self, images: Any, image_format: ImageFormat, *, random_crop: bool = False
    ) -> None:
        self.images, self.format, self.random_crop = images, image_format, random_crop
        interpolation = image_format.interpolation
        steps: list[Callable[[Image.Image], Image.Image]] = []
        if random_crop:
            steps = [v2.RandomResizedCrop(image_format.shape, interpolation=interpolation)]
        else:
            if image_format.resize:
                steps.append(v2.Resize(image_format.resize, interpolation))
            if image_format.crop:
                steps.append(v2.CenterCrop(image_format.crop))
        self.transform = v2.Compose(steps) if steps else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = fetch_image(self.images, index)
        name, mode = image_name(self.images, index), self.format.mode
        if mode == "L" and image.mode not in GRAY_MODES:
            raise DataError(f"{name} is in color where others are gray; convert one or the other.")
        if image.mode != mode:
            image = image.convert(mode)
        self._check_crop(image, name)
        pixels = np.array(self.transform(image) if self.transform else image)
        if pixels.shape[:2] != self.format.shape:
            raise mixed_sizes(name, pixels.shape[:2], self.format.shape)
        return pixels.reshape(*self.format.shape, -1), label

    def _check_crop(self, image: Image.Image, name: str) -> None:
        """Refuse to crop an image that is too small: torchvision would pad it."""
        if self.random_crop or self.format.resize or not self.format.crop:
            return
        if min(image.size) < self.format.crop:
            size = f"{image.width}x{image.height}"
            raise DataError(
                f"{name} is {size}, less than data.crop={self.format.crop}; set data.resize."
            )

    def read_all(self) -> tuple[Tensor, Tensor]:
        """Return all images uint8 [N, H, W, C] and labels int64 [N]."""
        count = len(self)
        images = np.empty((count, *self.format.shape, len(self.format.mode)), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)

        def read(start: int) -> None:
            for index in range(start, min(start + 64, count)):
                images[index], labels[index] = self[index]

        # Threads help, as PIL decodes without holding the interpreter's lock.
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for _ in threads.map(read, range(0, count, 64)):
                pass
        return torch.from_numpy(images), torch.from_numpy(labels)


def fetch_image(images: Any, index: int) -> tuple[Image.Image, int]:
    """Return image `index` and its label.

    Raises DataError if the image is not of 8 bits a channel or the label is not an integer.
    """
    name = image_name(images, index)
    try:
        image, label = images[index]
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be read: {reason}; replace or remove it.") from error
    if not isinstance(image, Image.Image):
        kind = f"a {type(image).__name__}"
    elif image.mode not in GRAY_MODES + COLOR_MODES:
        kind = f"of mode {image.mode}"
    else:
        kind = ""
    if kind:
        raise DataError(
            f"{name} is {kind}; images of 8 bits a channel are needed, or a data factory."
        )
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise DataError(
            f"{name} has a {type(label).__name__} as label; whole numbers are needed, or a data "
            "factory."
        )
    return image, int(label)


def image_name(images: Any, index: int) -> str:
    """Return the image's file, if known, or its number."""
    return str(images.samples[index][0]) if isinstance(images, DatasetFolder) else f"Image {index}"


def mixed_sizes(name: str, shape: tuple[int, ...], others: tuple[int, int]) -> DataError:
    """Return the error for an image whose (height, width) differs from that of others."""
    return DataError(
        f"{name} is {shape[1]}x{shape[0]} where others are {others[1]}x{others[0]}; bring all to "
        "one size with data.resize and data.crop."
    )
