"""Choose size, color mode and normalization: from the recipe, or from what the images look like."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torchvision.models import get_weight
from torchvision.transforms import InterpolationMode, v2

from ddqcli.data.images import (
    GRAY_MODES,
    SMALL_SIDE,
    ImageFormat,
    fetch_image,
    image_name,
    mixed_sizes,
)
from ddqcli.data.source import Source
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import IMAGENET_MEAN, IMAGENET_STD, DataSection

_SAMPLES = 32  # images of each split that are looked at


def choose_format(source: Source, section: DataSection) -> ImageFormat:
    """Return the format for the images of `source`.

    The section's values come first, then those of the torchvision weights it names. What both
    leave open follows from the images: up to 128 pixels they keep their size, larger ones are
    resized to 256 and cropped to 224.

    Raises DataError if images and section do not fit together, UsageError for unknown weights.
    """
    section, interpolation = _with_weights(section)
    sizes, gray = _sample_sizes(source)
    resize, crop = section.resize, section.crop
    shorter_sides = [min(size) for size in sizes.values()]
    if not source.keep_size and statistics.median(shorter_sides) > SMALL_SIDE:
        crop = crop or min(224, resize or 224)
        resize = resize or max(256, crop)
    if resize and crop and crop > resize:
        raise DataError(
            f"data.crop={crop} is larger than data.resize={resize}; make it {resize} or less."
        )
    shapes = {name: _resulting_shape(size, resize, crop) for name, size in sizes.items()}
    shape = next(iter(shapes.values()))
    for name, other in shapes.items():
        if other != shape:
            raise mixed_sizes(name, other, shape)
    if not gray and len(section.mean) == 1:  # for every channel
        section = section.model_copy(update={"mean": 3 * section.mean, "std": 3 * section.std})
    gray_as_rgb = _reads_gray_as_rgb(source, gray, section)
    return ImageFormat(
        mean=tuple(section.mean),
        std=tuple(section.std),
        mode="L" if gray and not gray_as_rgb else "RGB",
        resize=resize,
        crop=crop,
        shape=shape,
        interpolation=interpolation,
        gray_as_rgb=gray_as_rgb,
    )


def _with_weights(section: DataSection) -> tuple[DataSection, InterpolationMode]:
    """Fill in what the section leaves open from the torchvision weights it names."""
    if section.weights is None:
        return section, InterpolationMode.BILINEAR
    try:
        preset: Any = get_weight(section.weights).transforms()
        resize, crop = preset.resize_size[0], preset.crop_size[0]
        mean, std = list(preset.mean), list(preset.std)
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"data.weights={section.weights} is not known; name those of a torchvision classifier, "
            "such as ResNet18_Weights.IMAGENET1K_V1."
        ) from error
    defaults = list(IMAGENET_MEAN), list(IMAGENET_STD)
    if (section.mean, section.std) not in ((mean, std), defaults):
        raise UsageError(
            f"data.weights={section.weights} has its own mean and std; leave out data.mean and "
            "data.std."
        )
    filled = {
        "mean": mean,
        "std": std,
        "resize": section.resize or resize,
        "crop": section.crop or crop,
    }
    return section.model_copy(update=filled), preset.interpolation


def _sample_sizes(source: Source) -> tuple[dict[str, tuple[int, int]], bool]:
    """Return (width, height) of some images of both splits by name, and True if all are gray."""
    sizes, gray = {}, True
    for split, images in (("train", source.train), ("evaluation", source.val)):
        if len(images) == 0:
            raise DataError(f"{source.location} holds no {split} images.")
        last = len(images) - 1
        for index in sorted({round(k * last / (_SAMPLES - 1)) for k in range(_SAMPLES)}):
            image, _ = fetch_image(images, index)
            sizes[f"{image_name(images, index)} ({split})"] = image.size
            gray = gray and image.mode in GRAY_MODES
    return sizes, gray


def _resulting_shape(
    size: tuple[int, int], resize: int | None, crop: int | None
) -> tuple[int, int]:
    """Return (height, width) of an image of `size` (width, height), once resized and cropped."""
    if crop:
        return crop, crop
    if resize:
        height, width = v2.functional.resize(torch.empty(1, size[1], size[0]), [resize]).shape[1:]
        return height, width
    return size[1], size[0]


def _reads_gray_as_rgb(source: Source, gray: bool, section: DataSection) -> bool:
    """True if gray images are to be converted to RGB.

    That takes three mean values which someone chose for these images, not the default ones.
    """
    channels = len(section.mean)
    if channels == (1 if gray else 3):
        return False
    if not gray or channels != 3:
        kind = "is gray (1 channel)" if gray else "is in color (3 channels)"
        raise DataError(
            f"{source.location} {kind}, but data.mean has {channels} values; give one for each "
            "channel, or one for all."
        )
    if section.weights is None and section.mean == list(IMAGENET_MEAN):
        raise DataError(
            f"{source.location} is gray, but data.mean has its default of 3 values; give what the "
            "model was trained with: --set data.mean='[0.5]' --set data.std='[0.5]', or three "
            "values of your own to read gray as RGB."
        )
    return True
