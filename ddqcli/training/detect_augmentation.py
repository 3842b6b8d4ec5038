"""Detect how the float model's training images were augmented: padding color and flips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.augment import Fill
from ddqcli.data.batches import Batches
from ddqcli.data.load import Data
from ddqcli.data.trees import call
from ddqcli.recipe.schema import DataSection

_SAMPLES = 512  # enough for stable means
# Correct on 512 original and flipped images: the quickstart's model 512 and 176, a CIFAR ResNet-20
# 493 and 499.
_FLIP_INVARIANT = 0.95


@dataclass(frozen=True)
class DetectedAugmentation:
    """Augmentation that the float model gives away. None where the recipe or nothing decides."""

    fill: Fill | None = None
    flip: bool | None = None

    def apply(self, data: Data) -> None:
        """Augment the training images alike."""
        if data.augment and self.fill is not None:
            data.augment.fill = self.fill
        if data.augment and self.flip is not None:
            data.augment.flip = self.flip


def detect_augmentation(
    model: nn.Module, data: Data, section: DataSection, *, labels: bool
) -> DetectedAugmentation:
    """Detect and apply what `section` leaves to the model (`fill: auto`, `flip: auto`).

    Without `labels`, the model's own predictions stand for them.
    """
    detected = DetectedAugmentation()
    if data.augment and section.fill == "auto":
        detected = DetectedAugmentation(detect_padding_fill(model, data))
        detected.apply(data)  # flips are then judged on images padded as the model knows them
    if data.augment and section.flip == "auto":
        flip = is_flip_invariant(model, data, labels=labels)
        detected = DetectedAugmentation(detected.fill, flip)
        detected.apply(data)
    return detected


@torch.no_grad()
def is_flip_invariant(model: nn.Module, data: Data, *, labels: bool = True) -> bool:
    """True if accuracy on flipped training images is more than 95 % of that on the originals.

    Without `labels`, accuracy is agreement with the predictions on the originals.
    """
    correct = torch.zeros(2, dtype=torch.float64)  # originals, flipped
    for x, y in _first_samples(data.train):
        flipped = x.flip(-1)  # copied first: a network may change its input in place
        original_output = call(model, x)
        target = y if labels else original_output.argmax(-1)
        for index, output in enumerate((original_output, call(model, flipped))):
            correct[index] += data.metric(output, target).double().sum().cpu()
    return bool(correct[1] > _FLIP_INVARIANT * correct[0])


@torch.no_grad()
def detect_padding_fill(model: nn.Module, data: Data) -> Fill | None:
    """Return the padding color that fits the model's BatchNorm best.

    For each color, the channel means of the training images are compared with BatchNorm's running
    means, in running standard deviations. None without padding or BatchNorm, or if all colors fit
    equally well.
    """
    augment = data.augment
    norms = [
        module
        for module in model.modules()
        if type(module).forward is nn.BatchNorm2d.forward and module.running_mean is not None
    ]
    if not (augment and augment.pad and norms):
        return None
    batch_means: dict[nn.Module, list[Tensor]] = {}

    def observe(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        batch_means.setdefault(norm, []).append(x.float().transpose(0, 1).flatten(1).mean(1))

    def distance(norm: Any) -> float:
        difference = torch.stack(batch_means[norm]).mean(0) - norm.running_mean
        return float((difference.square() / (norm.running_var + norm.eps)).mean())

    hooks = [norm.register_forward_pre_hook(observe, with_kwargs=True) for norm in norms]
    distances, current_fill = {}, augment.fill
    for fill in augment.fills:
        augment.fill = fill
        batch_means.clear()
        for x, _ in _first_samples(data.train):
            call(model, x)
        distances[fill] = sum(map(distance, batch_means))
    for hook in hooks:
        hook.remove()
    augment.fill = current_fill
    nearest = min(distances, key=lambda fill: distances[fill])
    return nearest if distances[nearest] < max(distances.values()) else None


def _first_samples(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first batches of an epoch, of 512 samples or a few more in all."""
    seen = 0
    for x, y in batches.epoch(0):
        yield x, y
        seen += len(x)
        if seen >= _SAMPLES:
            return
