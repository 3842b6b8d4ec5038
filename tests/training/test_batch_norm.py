"""BatchNorm: which layers keep statistics, and what constant channels get."""

from __future__ import annotations

import pytest
import torch
from small_models import random_data, trainer
from tiny_training import STEPS, network, recipe
from torch import nn

from ddqcli.training.batch_norm import reestimate_batch_norm


def test_a_network_that_holds_its_batch_norm_fixed_keeps_its_statistics() -> None:
    class Fixed(nn.Sequential):
        def train(self, mode: bool = True) -> Fixed:
            super().train(mode)
            self[1].eval()
            return self

    running = trainer(Fixed(*network()), recipe(), STEPS, random_data())
    norm = running.model[1]
    norm.running_mean.fill_(0.5)
    means = []
    running.run(lambda _: None, lambda _: means.append(norm.running_mean.clone()), lambda: None)
    assert len(means) > 1
    assert all(torch.equal(mean, torch.full((8,), 0.5)) for mean in means)


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    reached, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = nn.ModuleDict({"reached": reached, "other": other})
    model.forward = reached.forward
    for norm in (reached, other):
        norm.running_mean.fill_(5)
    reestimate_batch_norm(model, random_data().train.epoch(0))
    assert other.running_mean.tolist() == [5, 5, 5]
    assert reached.running_mean.abs().max() < 2


@pytest.mark.parametrize("dead", [[1], [0, 2, 3], [0, 1, 2, 3]])
def test_a_constant_channel_gets_the_variance_of_its_layer_and_keeps_its_output(
    dead: list[int],
) -> None:
    """Otherwise one step of its level 0 raised the loss of a 4/8-bit ResNet-20 from 0.05 to 58."""
    torch.manual_seed(0)
    conv, norm, other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(2)
    conv.weight.data[dead] = 0
    conv.bias.data.fill_(1.3)  # rounding in float32 gives a constant some variance
    for parameter in (norm.weight, norm.bias):
        nn.init.uniform_(parameter)
    other.running_var[0] = 0
    model = nn.ModuleDict({"conv": conv, "norm": norm, "other": other})
    model.forward = lambda x: norm(conv(x.contiguous(memory_format=torch.channels_last)))
    reestimate_batch_norm(model, random_data().train.epoch(0))
    inputs = [x for x, _ in random_data().train.epoch(0)]
    var = torch.stack([conv(x).double().transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    live = torch.tensor([channel not in dead for channel in range(4)])
    usual = var[live].mean() if live.any() else 1.0
    assert torch.allclose(norm.running_var.double(), torch.where(live, var, usual), rtol=1e-4)
    assert other.running_var.tolist() == [0, 1]
    for channel in dead:
        assert torch.allclose(model.forward(inputs[0])[:, channel], norm.bias[channel], atol=1e-5)
        conv.weight.data[channel] = 0.01
        assert (model.forward(inputs[0])[:, channel] - norm.bias[channel]).abs().max() < 0.5
