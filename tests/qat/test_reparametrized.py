"""Weights that a network computes: made plain with the same function; copies stay apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import recipe
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import ddqcli
from ddqcli.checkpoint.state_fit import load_state
from ddqcli.qat.convert import convert
from ddqcli.qat.reparametrized import make_plain

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "older weight_norm": weight_norm,
    "older spectral_norm": spectral_norm,
}


def net(wrap: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(wrap(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_computed_weight_becomes_a_plain_one_of_the_same_function(name: str) -> None:
    model = net(WRAPPERS[name])
    before = model(X)
    assert make_plain(model) == ["0.weight"]
    assert torch.equal(model(X), before)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad
    assert make_plain(model) == []
    model.load_state_dict(model.state_dict())  # which older hooks would not know


def test_frozen_weights_stay_frozen_and_unwanted_ones_as_they_are() -> None:
    model = net(parametrizations.weight_norm)
    assert make_plain(model, lambda name: name == "2.weight") == []
    model[0].requires_grad_(False)
    make_plain(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].weight.requires_grad


def test_a_recurrent_layers_weight_is_made_plain() -> None:
    torch.manual_seed(0)
    model = parametrizations.weight_norm(nn.LSTM(6, 5), "weight_hh_l0")
    before = model(X)[0]
    assert make_plain(model) == ["weight_hh_l0"]
    assert torch.equal(model(X)[0], before)


@pytest.mark.parametrize("change", [make_plain, lambda model: convert(model, recipe())])
def test_a_changed_copy_leaves_the_original_as_it_was(
    change: Callable[..., object],
) -> None:
    """Deep copies of a parametrized layer share its class, and torch puts properties on it."""
    original = net(parametrizations.weight_norm)
    before, names = original(X), list(original.state_dict())
    changed = copy.deepcopy(original)
    change(changed)
    assert changed(X).shape == before.shape
    assert torch.equal(original(X), before)
    assert list(original.state_dict()) == names


def test_a_stored_plain_weight_fits_the_network_as_it_is_built(tmp_path: Path) -> None:
    plain = net(parametrizations.weight_norm)
    make_plain(plain)
    fresh = net(parametrizations.weight_norm)
    nn.init.ones_(fresh[0].bias)
    load_state(fresh, plain.state_dict(), tmp_path / "c.pt", "net")
    assert torch.equal(fresh.eval()(X), plain(X))
    ddqcli.quantize(plain, bits=8)
    ddqcli.save(plain, tmp_path / "model.safetensors")
    loaded = ddqcli.load(tmp_path / "model.safetensors", net(parametrizations.weight_norm))
    assert torch.equal(loaded(X), plain(X))
