"""Recurrent layers and cells, and all parts of attention: quantized, trained, stored, loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import fit_inputs, recipe
from torch import Tensor, nn

import ddqcli
from ddqcli.qat.convert import convert
from ddqcli.qat.model import quantized_state

X = torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: nn.LSTM(6, 5, 2, bidirectional=True),
    "LSTM with projection": lambda: nn.LSTM(6, 5, proj_size=3),
    "GRU": lambda: nn.GRU(6, 5, batch_first=True),
    "RNN": lambda: nn.RNN(6, 5, bias=False),
    "LSTMCell": lambda: nn.LSTMCell(6, 5),
    "GRUCell": lambda: nn.GRUCell(6, 5),
    "attention": lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True),
}


def forward(layer: Any, x: Tensor = X) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x)[0]
    is_cell = isinstance(layer, nn.RNNCellBase)
    result = layer(x[1], layer(x[0])) if is_cell else layer(x)
    return result[0] if isinstance(result, tuple) else result


def made(name: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[name]().eval()


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_is_quantized_and_read_quantized(name: str) -> None:
    """The outputs are those of a float layer that holds the quantized values."""
    layer = made(name)
    names = [key for key, _ in layer.named_parameters()]
    quantized = convert(layer, recipe(max_bits=3))
    assert sorted(tensor.name for tensor in quantized.tensors) == sorted(names)
    assert quantized.kept_float == {}
    plain = made(name)
    plain.load_state_dict(quantized_state(quantized), strict=True)
    assert torch.equal(forward(layer), forward(plain))
    assert not torch.equal(forward(layer), forward(made(name)))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_weights_and_levels_at_each_step(name: str) -> None:
    layer = made(name).train()
    quantized = convert(layer, recipe(max_bits=3))
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    outputs = []
    for _ in range(2):
        outputs.append(forward(layer).detach())
        optimizer.zero_grad()
        forward(layer).square().mean().backward()
        for tensor in quantized.tensors:
            if tensor.kind != "bias":
                assert tensor.parameter.grad is not None
                assert tensor.parameter.grad.abs().max() > 0
                assert tensor.quantizer.levels.grad.abs().max() > 0
        optimizer.step()
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_its_input_is_quantized_too(name: str) -> None:
    layer = made(name)
    quantized = convert(layer, recipe(act_bits=3))
    assert list(quantized.activations) == [""]
    if isinstance(layer, nn.RNNCellBase):
        assert fit_inputs(quantized, X.flatten(0, 1)) == []
    else:
        assert fit_inputs(quantized, X) == []
    plain = made(name)
    plain.load_state_dict(quantized_state(quantized), strict=True)
    assert torch.equal(forward(layer), forward(plain, quantized.activations[""](X)))


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_gives_the_same_network(name: str, tmp_path: Path) -> None:
    layer = ddqcli.quantize(made(name), bits=4.5)
    forward(layer)
    ddqcli.save(copy.deepcopy(layer), tmp_path / "a.safetensors")
    loaded = ddqcli.load(tmp_path / "a.safetensors", made(name))
    assert torch.equal(forward(loaded), forward(layer))
