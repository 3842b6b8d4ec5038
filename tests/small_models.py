"""Small models, recipes and data for the tests of conversion, gates and training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.qat.budget import make_budget
from ddqcli.qat.convert import convert
from ddqcli.qat.model import QuantizedModel
from ddqcli.recipe.schema import Recipe
from ddqcli.training.session import build_trainer
from ddqcli.training.trainer import Trainer


def recipe(*overrides: dict[str, Any], **weights: Any) -> Recipe:
    activations = {"bits": weights.pop("act_bits", None)}
    return Recipe.model_validate(
        {"weights": weights, "overrides": list(overrides), "activations": activations}
    )


def fit_inputs(quantized: QuantizedModel, *args: Any, **kwargs: Any) -> list[str]:
    """Calibrate the input quantizers on one call; return the layers that it did not reach."""
    for quantizer in quantized.activations.values():
        quantizer.observing = True
    quantized.model.eval()
    with torch.no_grad():
        quantized.model(*args, **kwargs)
    return [name for name, quantizer in quantized.activations.items() if not quantizer.fit()]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.Linear(16, 3),
    )


def bits_of(quantized: QuantizedModel) -> dict[str, tuple[int, int]]:
    """Fewest and most bits of each weight, by layer."""
    return {
        t.name.removesuffix(".weight"): (t.min_bits, t.max_bits)
        for t in quantized.tensors
        if t.kind != "bias"
    }


def images(channels: int, *sides: int) -> Tensor:
    return torch.randn(2, channels, *sides)


class Nested(nn.Module):
    """Layers in lists and dictionaries.

    One is called twice, one never, and of one the weight is read without calling its forward.
    """

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
            self.input_quantizer(nn.functional.linear(x, self.direct.weight, self.direct.bias))
            + self.parametrizations
        )


class RandomBatches:
    """Noisy patterns, one for each class. A function of epoch and batch number alone."""

    def __init__(
        self, count: int = 4, size: int = 8, side: int = 6, classes: int = 10, device: str = "cpu"
    ) -> None:
        self.count, self.size, self.side, self.classes = count, size, side, classes
        self.device = device
        self.samples = count * size

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        shape, float32 = (3, self.side, self.side), torch.float32
        seven = torch.Generator().manual_seed(7)
        patterns = torch.randn(self.classes, *shape, generator=seven, dtype=float32)
        for number in range(start, self.count):
            random = torch.Generator().manual_seed(1000 * epoch + number)
            y = torch.randint(self.classes, (self.size,), generator=random)
            noise = torch.randn(self.size, *shape, generator=random, dtype=float32)
            yield (patterns[y] + 0.5 * noise).to(self.device), y.to(self.device)


def random_data(**sizes: Any) -> Data:
    batches = RandomBatches(**sizes)
    return Data(
        batches,
        batches,
        batches,
        nn.functional.cross_entropy,
        lambda out, y: (out.argmax(1) == y).float(),
        None,
        "noise",
    )


def trainer(
    model: nn.Module, recipe: Recipe, steps: int, data: Data, teacher: nn.Module | None = None
) -> Trainer:
    """A calibrated trainer at its first step, as `ddq finetune` builds it."""
    quantized = convert(model, recipe)
    budget = make_budget(quantized, recipe)
    return build_trainer(quantized, teacher, data, budget, recipe, steps)
