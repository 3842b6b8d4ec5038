"""Distillation of the outputs of named layers: against float64, in a training step, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_data, trainer
from tiny_training import network
from torch import Tensor, nn
from torch.nn import functional as F

from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import Recipe
from ddqcli.training.features import check_features, feature_loss, features_of


class Shared(nn.Module):
    """Calls one layer twice, and gives a tuple with integers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.LSTM(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.layer(self.layer(x)))


def test_outputs_come_in_the_order_of_the_calls_and_hooks_are_removed() -> None:
    net, x = Shared(), torch.randn(4, 3)
    with features_of(net, ["last", "layer"]) as features:
        output, (hidden, cell) = net(x)
    first = net.layer(x)
    expected = [first, net.layer(first), output, hidden, cell]
    assert len(features) == 5
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    net(x)
    assert len(features) == 5


def test_the_loss_is_each_error_over_the_variance_of_the_target() -> None:
    """Against float64 in plain Python."""
    torch.manual_seed(0)
    targets = [3 * torch.randn(4, 5), torch.randn(2, 3, 2) + 7]
    features = [t + torch.randn_like(t) for t in targets]
    expected = 0.0
    for feature, target in zip(features, targets, strict=True):
        f, t = feature.double().flatten().tolist(), target.double().flatten().tolist()
        mean = sum(t) / len(t)
        variance = sum((v - mean) ** 2 for v in t) / len(t)
        expected += sum((a - b) ** 2 for a, b in zip(f, t, strict=True)) / len(t) / variance
    assert float(feature_loss(features, targets)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match=r"have the shapes \[\[4, 5\]\], and the teacher's"):
        feature_loss(features[:1], targets)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_training_step_adds_the_loss_of_the_features(weight: float) -> None:
    def loss(layers: list[str]) -> tuple[float, Any]:
        torch.manual_seed(0)
        settings = Recipe.model_validate(
            {
                "train": {"distill": {"weight": weight, "layers": layers}},
                # Levels by channel: channels are balanced neither with layers nor without.
                "weights": {"max_bits": 2, "granularity": "channel"},
                "data": {"batch_size": 8},
            }
        )
        data, teacher = random_data(), network().eval().requires_grad_(False)
        torch.manual_seed(1)
        running = trainer(network(), settings, 4, data, teacher)
        x, y = next(iter(data.train.epoch(0)))
        running.model.train()
        return running.forward(x, y)[2].item(), (running.model, teacher, x)

    without, _ = loss([])
    found, (model, teacher, x) = loss(["0", "3"])
    added = 0.0
    a, b = x, x
    for index in range(4):
        a, b = model[index](a), teacher[index](b)
        if index in (0, 3):
            added += float(F.mse_loss(a.double(), b.double()) / b.double().var(correction=0))
    assert found == pytest.approx(without + weight * added, rel=1e-4)
    assert added > 0.01


def test_layers_that_cannot_be_distilled_are_refused() -> None:
    net, x = network().eval(), torch.randn(2, 3, 6, 6)
    check_features(net, net, ["0"], x)
    with pytest.raises(UsageError, match="the network has no layer 00; did you mean 0"):
        check_features(net, net, ["00"], x)
    with pytest.raises(UsageError, match="the teacher has no layer 0; `ddq inspect"):
        check_features(net, nn.Sequential(), ["0"], x)
    net.add_module("part", nn.Linear(1, 1))
    net.forward = lambda x: net[0](x)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="no forward of part is called"):
        check_features(net, net, ["part"], x)
