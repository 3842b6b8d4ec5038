"""Parameters that no layer of PyTorch reads are weights if an override says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small_models import recipe
from torch import Tensor, nn
from torch.nn import functional as F

import ddqcli
from ddqcli.errors import UsageError
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import INPUT
from ddqcli.qat.model import QuantizedModel, quantized_state

X = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution and a matrix product with parameters of its own, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.qkv = nn.Parameter(torch.randn(16, 16))
        self.bias, self.norm = nn.Parameter(torch.randn(16)), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel)
        return self.norm(x.flatten(1) @ self.qkv + self.bias)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), Block(), nn.Linear(16, 3)).eval()


KERNEL = {"match": "*.kernel", "kind": "Conv2d", "bits": 2}
PRODUCT = {"match": "1.qkv", "kind": "Linear", "bits": 2}


def test_named_parameters_are_quantized_and_read_quantized() -> None:
    model = net()
    quantized = convert(model, recipe(KERNEL, PRODUCT, max_bits=4))
    kinds = {tensor.name: tensor.kind for tensor in quantized.tensors}
    assert (kinds["1.kernel"], kinds["1.qkv"]) == ("Conv2d", "Linear")
    bits = {t.name: (t.min_bits, t.max_bits) for t in quantized.tensors}
    assert bits["1.kernel"] == bits["1.qkv"] == (2, 2)
    assert bits["0.weight"] == (1, 4)
    assert model[1].kernel.unique().numel() <= 4
    assert set(quantized.kept_float) == {"1.bias", "1.norm.weight", "1.norm.bias"}
    plain = net()
    plain.load_state_dict(quantized_state(quantized))
    assert torch.equal(model(X), plain(X))
    model(X).square().mean().backward()
    for tensor in quantized.tensors:
        assert tensor.parameter.grad is not None


def test_what_they_are_multiplied_by_stays_float() -> None:
    quantized = convert(net(), recipe(KERNEL, PRODUCT, act_bits=8))
    assert sorted(quantized.activations) == ["0", "2"]
    assert not any(name.endswith(INPUT) for name in quantized.kept_float)


def test_they_are_found_again_and_stored(tmp_path: Path) -> None:
    model = ddqcli.quantize(net(), bits=5, overrides=[KERNEL, PRODUCT])
    names = {tensor.name: tensor.kind for tensor in QuantizedModel.of(model).tensors}
    assert (names["1.kernel"], names["1.qkv"]) == ("Conv2d", "Linear")
    ddqcli.save(model, tmp_path / "model.safetensors")
    loaded = ddqcli.load(tmp_path / "model.safetensors", net())
    assert torch.equal(loaded(X), model(X))


def test_without_an_override_the_reason_names_the_remedy() -> None:
    quantized = convert(net(), recipe())
    assert '{match: "1.qkv", kind: Linear}' in quantized.kept_float["1.qkv"]
    assert "kind: Linear" not in quantized.kept_float["1.bias"]


def test_a_name_that_is_no_parameter_is_refused() -> None:
    with pytest.raises(UsageError, match=r"matches the override 1.qvk"):
        convert(net(), recipe({"match": "1.qvk", "kind": "Linear"}))
    with pytest.raises(UsageError, match="are parameters of one module, 1; give them the same"):
        convert(net(), recipe(KERNEL, {"match": "1.qkv", "kind": "Linear", "bits": 3}))
    with pytest.raises(ValidationError, match="give match"):
        recipe({"type": "Block", "kind": "Linear"})


def test_where_nothing_can_be_quantized_the_largest_parameter_has_the_remedy() -> None:
    class Lin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.b2 = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.w = nn.Parameter(torch.ones(4, 8))

    remedy = r'can be quantized: 0.w: Lin w: .*, \{match: "0.w", kind: Linear\} in overrides'
    with pytest.raises(UsageError, match=remedy):
        convert(nn.Sequential(Lin()), recipe())
