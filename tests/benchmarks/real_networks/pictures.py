"""Image samples: crops of photographs that PyPI packages ship."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from real_networks.network import CALIBRATION, TEST

PACKAGES = ("scikit-image", "scikit-learn", "ultralytics", "imgaug", "insightface")

# Paths inside the packages. No photograph is in both sets.
CALIBRATION_PICTURES = (
    "sklearn/datasets/images/china.jpg",
    "skimage/data/astronaut.png",
    "skimage/data/coffee.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/ihc.png",
    "ultralytics/assets/zidane.jpg",
    "insightface/data/images/t1.jpg",
)
TEST_PICTURES = (
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
    "skimage/data/retina.jpg",
    "ultralytics/assets/bus.jpg",
    "imgaug/quokka.jpg",
)


def open_picture(site: Path, name: str) -> Image.Image:
    """Open a picture of an installed package in RGB; matplotlib's come from ddq's environment."""
    folder = Path(matplotlib.__file__).parents[1] if name.startswith("matplotlib/") else site
    return Image.open(folder / name).convert("RGB")


def photographs(size: int) -> Callable[[Path], tuple[Tensor, Tensor]]:
    """Return a function that draws crops of the photographs, uint8 [N,3,size,size]."""

    def samples(site: Path) -> tuple[Tensor, Tensor]:
        return (
            random_crops(site, CALIBRATION_PICTURES, CALIBRATION, size, 0),
            random_crops(site, TEST_PICTURES, TEST, size, 1),
        )

    return samples


def random_crops(site: Path, names: tuple[str, ...], count: int, size: int, seed: int) -> Tensor:
    """Crop random squares from the pictures in turn, uint8 [count,3,size,size]."""
    rng = np.random.default_rng(seed)
    sources = [open_picture(site, name) for name in names]
    crops = []
    for index in range(count):
        source = sources[index % len(sources)]
        shorter = min(source.size)
        side = min(shorter, max(96, round(shorter * rng.uniform(0.25, 1.0))))
        left = int(rng.integers(source.width - side + 1))
        top = int(rng.integers(source.height - side + 1))
        crop = source.crop((left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(resize(crop, size))
    return shuffled(torch.stack(crops), seed)


def to_tensor(image: Image.Image) -> Tensor:
    """Return a picture as uint8 [C,H,W]."""
    array = np.array(image, dtype=np.uint8)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array))


def resize(image: Image.Image, size: int) -> Tensor:
    """Return a picture scaled to uint8 [C,size,size]."""
    return to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2))


def shuffled(samples: Tensor, seed: int) -> Tensor:
    """Return the samples in random order."""
    return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))]


def jittered_boxes(
    boxes: list[tuple[float, float, float]], count: int, seed: int
) -> list[np.ndarray]:
    """Shift and scale the square boxes (left, top, side) at random, in turn."""
    rng = np.random.default_rng(seed)
    jittered = []
    for index in range(count):
        left, top, side = boxes[index % len(boxes)]
        scale = rng.uniform(0.8, 1.3)
        shift = rng.uniform(-0.15, 0.15, 2) * side
        center = np.array([left, top]) + side / 2 + shift
        jittered.append(np.array([*(center - side * scale / 2), side * scale]))
    return jittered


def random_jpegs(file: Path, split: str, count: int, seed: int) -> Tensor:
    """Decode random images of one split of an .npz of JPEG files, uint8 [count,3,H,W]."""
    with np.load(file) as archive:
        content, offset = archive[f"{split}_jpeg"].tobytes(), archive[f"{split}_offset"]
    chosen = np.random.default_rng(seed).permutation(len(offset) - 1)[:count]
    jpegs = (content[offset[index] : offset[index + 1]] for index in chosen)
    return torch.stack([to_tensor(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])


def imagenet_normalized(images: Tensor) -> Tensor:
    """Normalize pixels by ImageNet's mean and standard deviation."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def centered(images: Tensor) -> Tensor:
    """Scale pixels to -1 .. 1."""
    return (images - 127.5) / 128
