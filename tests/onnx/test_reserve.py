"""The reserve of an ONNX file: no choice of bits makes a larger file than a budget allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantized_net import shake
from test_onnx import residual_net
from torch import Tensor, nn

from ddqcli.errors import UsageError
from ddqcli.onnx import export, reserve
from ddqcli.onnx.export import make_onnx
from ddqcli.onnx.reserve import onnx_reserve
from ddqcli.qat.budget import stored_bytes
from ddqcli.qat.convert import convert
from ddqcli.qat.model import QuantizedModel
from ddqcli.recipe.schema import Recipe

ABOUT = {"ddq": "1.2.3", "source": "0" * 64}


def mobile_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 50),
    )


def quantized(model: nn.Module, **sections: Any) -> QuantizedModel:
    """Convert a copy. As `ddq finetune`, offer no 7 bits, which take 8 in the file."""
    offered = {"bits_offered": [1, 2, 3, 4, 5, 6, 8], **sections.pop("weights", {})}
    return convert(copy.deepcopy(model), Recipe.model_validate({"weights": offered, **sections}))


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch export the network once: bits change what `rewrite` makes of it alone."""
    made: list[onnx.ModelProto] = []
    real = export._export_float

    def cached(model: nn.Module, example: Any) -> onnx.ModelProto:
        if not made:
            made.append(real(model, example))
        proto = onnx.ModelProto()
        proto.CopyFrom(made[0])
        return proto

    monkeypatch.setattr(export, "_export_float", cached)


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("build", [residual_net, mobile_net])
@pytest.mark.usefixtures("exported_once")
def test_no_choice_of_bits_takes_more(build: Callable[[], nn.Module], act_bits: int | None) -> None:
    torch.manual_seed(0)
    model, x = shake(build()), torch.randn(4, 3, 16, 16)
    made = quantized(model, activations={"bits": act_bits})
    reserved = onnx_reserve(made, model, x, ABOUT)
    frozen = reserve._calibrated(made, x)
    draw, sizes = np.random.default_rng(0), []
    for trial in range(24):
        bits = {t.name: int(draw.choice([1, 2, 3, 4, 5, 6, 8])) for t in made.tensors}
        if trial < 8:
            bits = dict.fromkeys(bits, [1, 2, 3, 4, 5, 6, 8, 2][trial])
        tensors = [
            replace(
                tensor,
                indices=draw.integers(0, 1 << bits[tensor.name], tensor.indices.size).astype("u1"),
                levels=(np.sort(draw.choice(256, 1 << bits[tensor.name], False)).astype("u1"),),
                zero_point=np.array([draw.integers(0, 256)], np.uint8),
            )
            for tensor in frozen.quantized
        ]
        weights = replace(frozen, quantized=tensors).weights()
        loaded = reserve._filled(model, frozen)
        size = len(make_onnx(loaded, weights, x, ABOUT).raw)
        allowed = reserved + sum(stored_bytes(t, bits[t.name]) for t in made.tensors)
        assert size <= allowed, bits
        sizes.append(size / allowed)
    assert max(sizes) > 0.8, "the reserve is not much more than is needed"


def test_the_model_stays_as_it_was() -> None:
    model, x = shake(residual_net()), torch.randn(4, 3, 16, 16)
    made = quantized(model, activations={"bits": 8})
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    onnx_reserve(made, model, x, ABOUT)
    assert not any(quantizer.observing for quantizer in made.activations.values())
    after: dict[str, Tensor] = made.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_levels_by_channel_are_refused() -> None:
    model = shake(residual_net())
    made = quantized(model, weights={"granularity": "channel"})
    with pytest.raises(UsageError, match=r"set weights\.granularity=layer"):
        onnx_reserve(made, model, torch.randn(2, 3, 16, 16), ABOUT)
