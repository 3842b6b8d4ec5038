"""`QuantizedModel.of`: the quantizers are found again by walking the model."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import Nested, fit_inputs, images, recipe
from torch import nn
from torch.nn.utils import parametrize

from ddqcli.errors import UsageError
from ddqcli.qat.convert import convert, detach
from ddqcli.qat.model import QuantizedModel
from ddqcli.quant.quantizer import DDQuantizer


def test_it_finds_again_what_convert_returned() -> None:
    overrides = ({"match": "twice", "bits": 3}, {"match": "stem.*", "skip": True})
    quantized = convert(Nested(), recipe(*overrides, min_bits=2, max_bits=5, act_bits=4))
    assert QuantizedModel.of(quantized.model) == quantized
    for name in fit_inputs(quantized, images(3, 6, 6)):
        quantized.keep_input_float(name)
    assert QuantizedModel.of(quantized.model) == quantized


def test_of_a_copy_it_finds_the_copys_quantizers() -> None:
    quantized = convert(Nested(), recipe(max_bits=3, act_bits=8))
    found = QuantizedModel.of(copy.deepcopy(quantized.model))
    assert [(t.name, t.kind, t.min_bits, t.max_bits) for t in found.tensors] == [
        (t.name, t.kind, t.min_bits, t.max_bits) for t in quantized.tensors
    ]
    assert list(found.activations) == list(quantized.activations)
    assert found.kept_float == quantized.kept_float
    owned = {id(module) for module in found.model.modules()}
    assert {id(t.quantizer) for t in found.tensors} <= owned
    assert not owned & {id(t.quantizer) for t in quantized.tensors}


def test_quantizers_that_were_attached_by_hand_are_found_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    quantizer = DDQuantizer.from_tensor(model[1].weight, 4)
    parametrize.register_parametrization(model[1], "weight", quantizer, unsafe=True)
    found = QuantizedModel.of(model)
    (tensor,) = found.tensors
    assert (tensor.name, tensor.quantizer, tensor.max_bits) == ("1.weight", quantizer, 4)
    assert list(found.float_tensors()) == ["0.weight", "0.bias", "1.bias"]


def test_a_float_model_has_none() -> None:
    with pytest.raises(UsageError, match="This Linear has no quantizers"):
        QuantizedModel.of(nn.Linear(2, 2))


def test_detach_gives_the_float_model_back() -> None:
    model, x = Nested(), images(3, 6, 6)
    before = model.eval()(x)
    parameters = dict(model.named_parameters())
    quantized = convert(model, recipe(max_bits=2, act_bits=4))
    assert fit_inputs(quantized, x) == ["direct", "unused"]
    assert not torch.equal(model(x), before)
    detach(quantized)
    assert torch.equal(model(x), before)
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
