"""Weights inside the cells of their assigned levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import same_bits
from torch import Tensor

from ddqcli.quant.cells import inside_cells, level_values
from ddqcli.quant.quantizer import DDQuantizer

QUANTIZERS: dict[str, dict[str, Any]] = {
    "1 bit": {"max_bits": 1},
    "3 of 8 bits": {"max_bits": 8, "bits": 3},
    "8 bits": {"max_bits": 8},
    "uniform": {"max_bits": 4, "kind": "uniform"},
    "power of two": {"max_bits": 4, "bits": 3, "kind": "power_of_two"},
    "by channel": {"max_bits": 3, "channel_axis": 0},
    "by channel along axis 1": {"max_bits": 3, "channel_axis": 1},
}


def weight() -> Tensor:
    return torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))


def random_levels(quantizer: DDQuantizer, like: Tensor) -> Tensor:
    """A level drawn at random from the weight's own table, shaped as the weight."""
    random = torch.Generator().manual_seed(1)
    values = level_values(quantizer)
    shape = like.movedim(quantizer.axis, 0).shape
    index = torch.randint(
        values.shape[1], (len(values), like.numel() // len(values)), generator=random
    )
    return values.gather(1, index).view(shape).movedim(0, quantizer.axis)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_quantize_to_the_assigned_levels_exactly(
    name: str, memory_format: torch.memory_format
) -> None:
    float_weight = weight().to(memory_format=memory_format)
    quantizer = DDQuantizer.from_tensor(float_weight, **QUANTIZERS[name])
    assigned = random_levels(quantizer, float_weight)
    moved = inside_cells(quantizer, float_weight, assigned)
    assert same_bits(quantizer(moved).detach(), assigned)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_weights_that_quantize_to_their_level_stay(name: str) -> None:
    float_weight = weight()
    quantizer = DDQuantizer.from_tensor(float_weight, **QUANTIZERS[name])
    assigned = random_levels(quantizer, float_weight)
    stays = quantizer(float_weight) == assigned
    moved = inside_cells(quantizer, float_weight, assigned)
    assert torch.equal(moved[stays], float_weight[stays])
    unmoved = inside_cells(quantizer, float_weight, quantizer(float_weight).detach())
    assert torch.equal(unmoved, float_weight)


def test_weights_move_to_15_percent_of_the_way_from_border_to_level() -> None:
    quantizer = DDQuantizer(1, 2)
    quantizer.levels.data = torch.tensor([[0.0, 10.0, 20.0, 40.0]])
    x = torch.tensor([-3.0, 50.0, 12.0, 19.0, 24.0, 9.0])
    assigned = torch.tensor([10.0, 0.0, 20.0, 10.0, 40.0, 0.0])
    # Borders at 5, 15 and 30; the outer cells end at their levels.
    expected = torch.tensor([5.75, 4.25, 15.75, 14.25, 31.5, 4.25])
    assert torch.allclose(inside_cells(quantizer, x, assigned), expected)


def test_equal_levels_have_one_cell() -> None:
    quantizer = DDQuantizer(1, 2)
    quantizer.levels.data = torch.tensor([[10.0, 10.0, 10.0, 20.0]])
    moved = inside_cells(quantizer, torch.tensor([0.0, 30.0]), torch.tensor([20.0, 10.0]))
    assert torch.allclose(moved, torch.tensor([15.75, 14.25]))


def test_level_values_are_those_in_force_with_short_rows_filled() -> None:
    x = weight()
    quantizer = DDQuantizer.from_tensor(x, 4, channel_axis=0)
    quantizer.fit(x, (1, 2, 3, 4, 2, 1))
    values = level_values(quantizer)
    assert values.shape == (6, 16)
    for channel, (row, bits) in enumerate(zip(values, quantizer.bits, strict=True)):
        in_force = set(quantizer(x).detach()[channel].flatten().tolist())
        assert in_force <= set(row.tolist())
        assert torch.equal(row[2**bits - 1 :], row[-1:].expand(16 - 2**bits + 1))
        assert (row.diff() >= 0).all()
