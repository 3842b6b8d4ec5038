"""The schema of a finished model: written with torch, read without it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from small_models import fit_inputs, images, recipe
from torch import Tensor, nn

from ddqcli.artifact.tensors import BFLOAT16
from ddqcli.errors import DDQError
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import FrozenModel, freeze, tensor_to_array


class Tied(nn.Module):
    """A shared quantized tensor, a shared float one, and floats of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(4)
        self.again = self.norm
        self.register_buffer("calls", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.again(self.first(self.norm(self.conv(x).mean((2, 3))))))


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = convert(Tied(), recipe(max_bits=3, granularity="channel", act_bits=4))
    assert fit_inputs(model, images(3, 6, 6)) == []
    return freeze(model)


def test_stored_levels_and_indices_give_the_trained_values(state: dict[str, Any]) -> None:
    frozen = FrozenModel.from_state(state)
    assert [t.name for t in frozen.quantized] == list(state["trained"])
    for tensor in frozen.quantized:
        assert np.array_equal(tensor.dequantize(), frozen.trained[tensor.name]), tensor.name
    assert [table.name for table in frozen.activations] == [
        f"{name} (input)" for name in ("conv", "first", "second")
    ]


def test_a_file_is_expected_to_hold_every_tensor_under_each_of_its_names(
    state: dict[str, Any],
) -> None:
    frozen = FrozenModel.from_state(state)
    assert frozen.aliases == {
        "second.weight": "first.weight",
        "again.weight": "norm.weight",
        "again.bias": "norm.bias",
    }
    expected = frozen.expected()
    assert {name for name in expected if "(input)" not in name} == set(Tied().state_dict())
    assert expected["second.weight"] is expected["first.weight"]
    assert expected["again.bias"] is expected["norm.bias"]
    assert expected["calls"] == 7
    weights = frozen.weights()
    assert weights["second.weight"] is weights["first.weight"]
    assert "again.weight" not in weights


def test_the_caller_says_how_a_tensor_is_read(state: dict[str, Any]) -> None:
    """As `ddq inspect` does, which reads locations in the file in place of tensors."""
    arrays: list[np.ndarray] = []

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, list):
            return [place(item) for item in value]
        if isinstance(value, Tensor):
            arrays.append(value.numpy())
            return len(arrays) - 1
        return value

    frozen, direct = (
        FrozenModel.from_state(place(state), lambda at: arrays[at]),
        FrozenModel.from_state(state),
    )
    assert frozen.expected().keys() == direct.expected().keys()
    for name, array in direct.expected().items():
        assert np.array_equal(array, frozen.expected()[name])


def test_reading_needs_no_torch() -> None:
    program = "import sys, ddqcli.qat.frozen; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_tensor_keeps_its_bits_as_an_array() -> None:
    brain = torch.tensor([1.5, -3e-39], dtype=torch.bfloat16)
    array = tensor_to_array(brain)
    assert array.dtype == BFLOAT16
    assert array.tobytes() == brain.view(torch.int16).numpy().tobytes()
    assert tensor_to_array(torch.tensor(2**53 + 1)) == np.array(2**53 + 1)
    with pytest.raises(DDQError, match=r"float8_e5m2 cannot be stored; keep it out of the model's"):
        tensor_to_array(torch.zeros(2).to(torch.float8_e5m2))
