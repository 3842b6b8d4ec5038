"""Networks that write their own weights are refused; recomputing ones train as others do."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import random_data, trainer
from tiny_training import finish, network, recipe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.errors import DataError, UsageError
from ddqcli.qat.convert import convert
from ddqcli.recipe.assignments import with_assignments
from ddqcli.training.network_checks import (
    draws_numbers,
    is_reentrant,
    refuse_batch_of_one,
    refuse_scripted_parts,
    refuse_written_weights,
    written_buffers,
)


class ByData(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
        return super().forward(x)


class InPlace(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-2, 2)
        return super().forward(x)


class OnlyInTraining(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data.clamp_(-2, 2)
        return super().forward(x)


def with_layer(kind: type[nn.Conv2d]) -> nn.Sequential:
    net = network()
    net[0] = kind(3, 8, 3)
    return net


@pytest.mark.parametrize("kind", [ByData, InPlace, OnlyInTraining])
def test_a_layer_that_writes_its_own_weight_is_refused(kind: type[nn.Conv2d]) -> None:
    """Also where the limits take no effect at the weights as they are."""
    net = with_layer(kind)
    before = copy.deepcopy(net.state_dict())
    quantized = convert(copy.deepcopy(net), recipe())
    with pytest.raises(UsageError, match=rf"of 0 \({kind.__name__}\) writes its own 0.weight") as e:
        refuse_written_weights(quantized, net, random_data())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    (advice,) = re.findall(r"--set '(.*)'", str(e.value))
    skipped = recipe(overrides=with_assignments({}, [advice])["overrides"])
    refuse_written_weights(convert(copy.deepcopy(net), skipped), net, random_data())


def test_other_networks_are_not_refused() -> None:
    refuse_written_weights(convert(network(), recipe()), network(), random_data())
    assert not is_reentrant(network(), random_data())


class Recomputing(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Any:
        x = self.net[:3](x)
        if self.training:
            x = checkpoint(self.net[3:5], x, use_reentrant=self.reentrant)
        else:
            x = self.net[3:5](x)
        return self.net[5:](x)


def test_reentrant_recomputation_trains_as_the_other_kind() -> None:
    assert is_reentrant(Recomputing(True), random_data())
    assert not is_reentrant(Recomputing(False), random_data())
    states = []
    for reentrant in (True, False):
        net = Recomputing(reentrant)
        teacher = copy.deepcopy(net).eval().requires_grad_(False)
        running = trainer(net, recipe(), 6, random_data(), teacher)
        finish(running)
        states.append(running.model.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value.double(), states[1][name].double(), atol=1e-5), name


@pytest.mark.parametrize(("samples", "refused"), [(33, True), (34, False), (32, False)])
def test_a_last_batch_of_one_sample_is_refused_where_batch_norm_needs_more(
    samples: int, refused: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randn(samples, 3, 6, 6, generator=draw), torch.arange(samples) % 3)
    train = ReadyBatches(DataLoader(rows, 16), torch.device("cpu"), seed=0)
    data = replace(random_data(), train=train)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4))
    refuse_batch_of_one(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), data)
    if refused:
        with pytest.raises(DataError, match=r"drop_last=True, or --set train.batch_norm=held"):
            refuse_batch_of_one(flat, data)
    else:
        refuse_batch_of_one(flat, data)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_part_that_torch_jit_has_compiled_is_refused_by_name() -> None:
    net = network()
    refuse_scripted_parts(net)
    net[1] = torch.jit.script(nn.ReLU())  # without weights
    refuse_scripted_parts(net)
    net[0] = torch.jit.script(nn.Conv2d(3, 8, 3))
    with pytest.raises(UsageError, match=r"^0 is compiled by torch.jit, .* as a plain module"):
        refuse_scripted_parts(net)


def test_a_network_that_draws_numbers_in_eval_mode_is_known() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(2)

    x = torch.randn(4, 3)
    assert draws_numbers(Noisy(3, 2), x)
    assert not draws_numbers(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), x)


def test_buffers_that_a_forward_in_eval_mode_changes_are_named() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.norm(x - self.mean)

    model, x = Counting(), torch.randn(4, 3)
    assert written_buffers(model, x) == ["calls", "mean"]
    assert model.calls == 0
    assert written_buffers(model.norm.train(), x) == []
