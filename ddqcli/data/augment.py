"""Augmentation and normalization of whole batches of images, repeatable for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddqcli.data.batches import to_device
from ddqcli.data.seeding import generator

Fill = Literal["black", "mean"]  # color of the padding


def random_crops(images: Tensor, pad: int, tops: Tensor, lefts: Tensor, fill: Tensor) -> Tensor:
    """Pad images by `pad` pixels and crop each back to its size at its own position.

    Args:
        images: uint8 [B, H, W, C].
        pad: pixels on each side.
        tops, lefts: [B], positions of the crops in 0..2*pad.
        fill: uint8 [C], color of the padding.
    """
    batch, height, width, channels = images.shape
    padded = fill.expand(batch, height + 2 * pad, width + 2 * pad, channels).clone()
    padded[:, pad : pad + height, pad : pad + width] = images
    # [B, H + 2 pad, 2 pad + 1, W * C]: copying whole rows is fast.
    windows = padded.flatten(2).unfold(2, width * channels, channels)
    rows = tops[:, None] + torch.arange(height)
    crops = windows[torch.arange(batch)[:, None], rows, lefts[:, None]]
    return crops.reshape(batch, height, width, channels)


def flip_images(images: Tensor, flips: Tensor) -> Tensor:
    """Return images [B, H, W, C], flipped horizontally where `flips` [B] is true."""
    result = images.clone()
    result[flips] = images[flips].flip(2)
    return result


def normalize_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x / 255 - mean) / std of uint8 images [B, H, W, C].

    The result is float32 [B, C, H, W] in channels_last memory format.
    """
    batch, height, width, channels = images.shape
    # Rows of W * C values are faster to process than pixels of C.
    rows = images.flatten(2).to(torch.float32)
    # A Python 255 would make CUDA multiply by the rounded 1 / 255; torch.tensor would wait for it.
    rows.div_(torch.full((), 255.0, device=images.device))
    rows.sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class Preprocess:
    """Turn uint8 images [B, H, W, C] into the model's input, float32 [B, C, H, W] on the device.

    Training images are augmented first: random crops after padding (`pad` > 0) and random
    horizontal flips (`flip`). The padding is black, as torchvision pads images, or has the mean
    color, which is 0 after normalization.

    Args:
        mean, std: one value for each channel, of pixel values in 0..1.
        seed: of the augmentation; each process of a distributed run has its own.
        pad: pixels on each side.
        fill: color of the padding, a key of `fills`.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        seed: int = 0,
        pad: int = 0,
        fill: Fill = "black",
        flip: bool = False,
    ) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)
        self.device, self.seed, self.pad, self.fill, self.flip = device, seed, pad, fill, flip
        pixel_mean = torch.tensor(mean, dtype=torch.float32) * 255
        mean_color = pixel_mean.round().clamp(0, 255).to(torch.uint8)
        self.fills: dict[Fill, Tensor] = {"black": torch.zeros_like(mean_color), "mean": mean_color}

    def __call__(self, images: Tensor, epoch: int, batch: int) -> Tensor:
        """Return the input for batch number `batch` of epoch `epoch`."""
        draw = generator("augment", self.seed, epoch, batch)
        if self.pad:
            tops, lefts = torch.randint(0, 2 * self.pad + 1, (2, len(images)), generator=draw)
            images = random_crops(images, self.pad, tops, lefts, self.fills[self.fill])
        if self.flip:
            images = flip_images(images, torch.rand(len(images), generator=draw) < 0.5)
        return normalize_images(to_device(images, self.device), self.mean, self.std)
