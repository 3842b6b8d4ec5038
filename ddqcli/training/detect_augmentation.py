"""Which augmentation the float model was trained with: padding and flips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.batches import Batches
from ddqcli.data.load import Data
from ddqcli.recipe.schema import DataSection
from ddqcli.training.evaluate import output_of

_ENOUGH = 512  # samples, for means
_NEARLY = 0.95  # of 512 images the quickstart's model reads 512 plain and 176 mirrored, a CIFAR ResNet-20 493 and 499


def detect_augmentation(
    model: nn.Module, data: Data, section: DataSection, *, labels: bool
) -> dict[str, Any]:
    """Let `fill` and `flip` of `data.augment` be as the model was trained, where `section` leaves them to it; what it tells."""
    found: dict[str, Any] = {}
    if data.augment and section.fill == "auto" and (fill := detect_padding_fill(model, data)):
        found["fill"] = data.augment.fill = fill
    if data.augment and section.flip == "auto":
        found["flip"] = data.augment.flip = is_flip_invariant(model, data, labels=labels)
    return found


@torch.no_grad()
def is_flip_invariant(model: nn.Module, data: Data, *, labels: bool = True) -> bool:
    """Whether `model` knows mirrored images: of some hundred in training it has right nearly as many as of the plain ones.

    Without `labels`, right is what it makes of the plain one.
    """
    right = torch.zeros(2, dtype=torch.float64)
    for x, y in _some(data.train):
        mirrored = x.flip(-1)  # first, since a network may change its input in place
        plain = output_of(model(x))
        for number, output in enumerate((plain, output_of(model(mirrored)))):
            right[number] += (
                data.metric(output, y if labels else plain.argmax(-1)).double().sum().cpu()
            )
    return bool(right[1] > _NEARLY * right[0])


def _some(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The first batches, of some hundred samples in all."""
    seen = 0
    for x, y in batches.epoch(0):
        yield x, y
        seen += len(x)
        if seen >= _ENOUGH:
            return


@torch.no_grad()
def detect_padding_fill(model: nn.Module, data: Data) -> str | None:
    """Which of `Prepare.fills` the images that `model` was trained on were padded with; None if nothing tells.

    With each, the means over some hundred samples are held against BatchNorm's running means, in running deviations.
    """
    augment = data.augment
    norms = [
        m
        for m in model.modules()
        if type(m).forward is nn.BatchNorm2d.forward and m.running_mean is not None
    ]
    if not (augment and augment.pad and norms):
        return None
    means: dict[nn.Module, list[Tensor]] = {}

    def look(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        means.setdefault(norm, []).append(x.float().transpose(0, 1).flatten(1).mean(1))

    def distance(norm: Any) -> float:
        off = torch.stack(means[norm]).mean(0) - norm.running_mean
        return float((off.square() / (norm.running_var + norm.eps)).mean())

    hooks = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in norms]
    found, in_force = {}, augment.fill
    for fill in augment.fills:
        augment.fill = fill
        means.clear()
        for x, _ in _some(data.train):
            model(x)
        found[fill] = sum(map(distance, means))
    for hook in hooks:
        hook.remove()
    augment.fill = in_force
    nearest = min(found, key=lambda fill: found[fill])
    return nearest if found[nearest] < max(found.values()) else None
