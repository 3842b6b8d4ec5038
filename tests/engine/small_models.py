"""Small models and recipes for the tests of what is quantized and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.engine.convert import Converted
from ddqcli.recipe import Recipe


def recipe(*overrides: dict[str, Any], **weights: Any) -> Recipe:
    activations = {"bits": weights.pop("act_bits", None)}
    return Recipe.model_validate({"weights": weights, "overrides": list(overrides), "activations": activations})


def fit_inputs(converted: Converted, *args: Any, **kwargs: Any) -> list[str]:
    """Calibrate the activations on one call; returns the layers that were not reached."""
    for quantizer in converted.activations.values():
        quantizer.observing = True
    converted.model.eval()
    with torch.no_grad():
        converted.model(*args, **kwargs)
    return [name for name, quantizer in converted.activations.items() if not quantizer.fit()]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 3)
    )


def bits_of(converted: Converted) -> dict[str, tuple[int, int]]:
    return {t.name.removesuffix(".weight"): (t.min_bits, t.max_bits) for t in converted.tensors if t.kind != "bias"}


def images(channels: int, *sides: int) -> Tensor:
    return torch.randn(2, channels, *sides)


class Nested(nn.Module):
    """Layers in lists and dictionaries, one called twice, one never, and one whose weight is read past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1)}) for _ in range(2)])
        self.twice = nn.Linear(4, 4)
        self.direct = nn.Linear(4, 3)
        self.unused = nn.Linear(7, 7)
        self.original = nn.Parameter(torch.ones(4))  # names that a parametrization uses as well
        self.input_quantizer = nn.Linear(3, 3)
        self.register_buffer("parametrizations", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block["conv"](x).relu()
        x = self.twice(self.twice(x.mean((2, 3)) * self.original))
        return (
            self.input_quantizer(nn.functional.linear(x, self.direct.weight, self.direct.bias)) + self.parametrizations
        )
