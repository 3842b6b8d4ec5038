"""The warning that inputs are not those the float model was trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import random_data
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.training.check_inputs import input_warning

NORMALIZATION = "data.mean [0.5], data.std [0.2]"


class Inputs:
    """Batches of inputs with mean 2 and standard deviation 3, scaled and shifted.

    They are sorted, so that one batch is unlike the others.
    """

    samples = 256

    def __init__(self, scale: float = 1.0, shift: float = 0.0, **like: Any) -> None:
        random = torch.Generator().manual_seed(0)
        x = 2 + 3 * torch.randn(256, 3, 8, 8, generator=random)
        x = x[x.mean((1, 2, 3)).argsort()]
        self.batch = (scale * x + shift, torch.randint(10, (256,), generator=random))

    def __len__(self) -> int:
        return 4

    def epoch(self, epoch: int, start: int = 0) -> Any:
        yield from zip(*(part.split(64) for part in self.batch), strict=True)


def network() -> nn.Sequential:
    """A network whose first BatchNorm knows the inputs as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 10))
    norm: Any = model[1]
    norm.momentum = 1.0
    with torch.no_grad():
        model(Inputs().batch[0])
    return model.eval()


def data(scale: float = 1.0, shift: float = 0.0, **fields: Any) -> Data:
    inputs: Any = Inputs(scale, shift)
    return replace(random_data(), held_out=inputs, **fields)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1.2, 0), (1, 0.3), (0.8, -0.2)])
def test_inputs_as_in_training_are_not_mentioned(scale: float, shift: float) -> None:
    assert input_warning(network(), data(scale, shift), 90, NORMALIZATION) is None


@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (1 / 255, 0), (0.5, 0), (1, 5), (1, -9)])
def test_other_inputs_are(scale: float, shift: float) -> None:
    model = network()
    before = [value.clone() for value in model.state_dict().values()]
    text = input_warning(model, data(scale, shift), 90, NORMALIZATION)
    assert text is not None
    assert text.startswith("the inputs are not as in training: the first BatchNorm (1) sees means")
    assert f"now {NORMALIZATION}" in text
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert not model[1]._forward_pre_hooks


def test_the_numbers_are_the_shift_and_the_ratio_of_variances() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10)).eval()
    norm: Any = model[0]
    x: Tensor = Inputs(2.0).batch[0][::4].double()
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    shift = (((x.mean((0, 2, 3)) - 1) ** 2 / 4).mean() ** 0.5).item()
    ratio = (x.var((0, 2, 3), correction=0) / 4).log().mean().exp().item()
    text = input_warning(model, data(2.0), 90, NORMALIZATION)
    assert f"off by {shift:.2g} standard deviations and {ratio:.2g} times the variance" in str(text)


@pytest.mark.parametrize(("accuracy", "warned"), [(9.8, True), (14.9, True), (20.0, False)])
def test_accuracy_near_chance_is_told(accuracy: float, warned: bool) -> None:
    text = input_warning(network(), data(), accuracy, NORMALIZATION)
    assert (text is not None) == warned
    if text:
        assert text.startswith("the float accuracy is near that of a random class, 10.0 %")


def test_chance_means_nothing_for_a_metric_of_ones_own() -> None:
    assert input_warning(network(), data(own_metric=True), 3.0, NORMALIZATION) is None
    assert input_warning(network(), data(labelled=False), 3.0, NORMALIZATION) is None


def test_networks_without_batch_norm_are_judged_by_accuracy_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
    assert input_warning(model, data(255), 90, NORMALIZATION) is None
    assert "random class" in str(input_warning(model, data(255), 10, NORMALIZATION))
