"""Randomness that hangs on nothing but its key, and the augmentation of whole batches that uses it.

A key is a few words such as ("order", seed, epoch). Nothing here draws from a global generator, so results do not
depend on how many processes read the images, on what ran before, or on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddqcli.data.seeding import generator


def random_crops(images: Tensor, pad: int, tops: Tensor, lefts: Tensor, fill: Tensor) -> Tensor:
    """Pad images [B,H,W,C] with `fill` [C] by `pad` pixels and cut [H,W] out at tops, lefts [B] (0..2*pad) of each."""
    batch, height, width, channels = images.shape
    padded = fill.expand(batch, height + 2 * pad, width + 2 * pad, channels).clone()
    padded[:, pad : pad + height, pad : pad + width] = images
    # [B, H + 2 pad, 2 pad + 1, W * C]; copies whole rows: fast
    windows = padded.flatten(2).unfold(2, width * channels, channels)
    rows = tops[:, None] + torch.arange(height)
    return windows[torch.arange(batch)[:, None], rows, lefts[:, None]].unflatten(
        2, (width, channels)
    )


def flip_images(images: Tensor, flips: Tensor) -> Tensor:
    """Images [B,H,W,C], those where flips [B] is true mirrored left to right."""
    result = images.clone()
    result[flips] = images[flips].flip(2)
    return result


def normalize_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std of uint8 images [B,H,W,C]: float32 [B,C,H,W], channels last in memory."""
    width, channels = images.shape[2:]
    rows = images.flatten(2).to(
        torch.float32
    )  # rows of W * C values are faster to walk than pixels of C
    rows.div_(
        torch.tensor(255.0, device=images.device)
    )  # by a plain 255 CUDA would multiply with the rounded 1 / 255
    rows.sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to CUDA without waiting for the copy."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class Preprocess:
    """Makes uint8 images [B,H,W,C] the model's input: augments (pad > 0, flip), moves to the device, normalises.

    Padding is black, as torchvision pads images, or of the mean colour, as who pads with 0 after normalisation has it.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        seed: int = 0,
        pad: int = 0,
        fill: str = "black",
        flip: bool = False,
    ) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)
        self.device, self.seed, self.pad, self.fill, self.flip = device, seed, pad, fill, flip
        colour = (
            (torch.tensor(mean, dtype=torch.float32) * 255).round().clamp(0, 255).to(torch.uint8)
        )
        self.fills = {"black": torch.zeros_like(colour), "mean": colour}

    def __call__(self, images: Tensor, epoch: int, batch: int) -> Tensor:
        """Float32 [B,C,H,W] on the device; the augmentation is that of batch `batch` of epoch `epoch`."""
        draw = generator("augment", self.seed, epoch, batch)
        if self.pad:
            tops, lefts = torch.randint(0, 2 * self.pad + 1, (2, len(images)), generator=draw)
            images = random_crops(images, self.pad, tops, lefts, self.fills[self.fill])
        if self.flip:
            images = flip_images(images, torch.rand(len(images), generator=draw) < 0.5)
        return normalize_images(to_device(images, self.device), self.mean, self.std)
