"""FrozenInputQuantizer against the trained quantizer and FORMAT.md's formula, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.frozen_input import FrozenInputQuantizer
from ddqcli.quant.grid import representable_scale

SPECIAL = torch.tensor([0.0, -0.0, 1e-44, -1e-44, 1e30, -1e30])


def by_formula(x: torch.Tensor, levels: list[int], scale: float, zero_point: int) -> torch.Tensor:
    """FORMAT.md's rule in float64, where a level times the scale, and its half, are exact."""
    chosen = []
    for value in x.tolist():
        if levels == list(range(len(levels))):
            steps = float(np.float32(value) / np.float32(scale))
            chosen.append(min(max(round(steps) + zero_point, 0), len(levels) - 1))
        else:
            ends = [(low + high - 2 * zero_point) * scale / 2 for low, high in pairwise(levels)]
            chosen.append(sum(value >= end for end in ends))
    return torch.tensor([(levels[k] - zero_point) * scale for k in chosen], dtype=torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.integers(1, 8).map(lambda bits: list(range(2**bits))),
        st.integers(1, 4).flatmap(
            lambda bits: st.lists(
                st.integers(0, 255), min_size=2**bits, max_size=2**bits, unique=True
            ).map(sorted)
        ),
    ),
    st.floats(1e-4, 10),
    st.integers(0, 255),
    st.integers(0, 2**31),
)
def test_every_value_becomes_the_level_of_the_format(
    levels: list[int], step: float, zero_point: int, seed: int
) -> None:
    scale = float(representable_scale(torch.tensor(step)))
    frozen = FrozenInputQuantizer(torch.tensor(levels, dtype=torch.uint8), scale, zero_point)
    spread = (torch.rand(400, generator=torch.Generator().manual_seed(seed)) * 600 - 300) * scale
    ties = (torch.arange(-520.0, 520.0) / 2) * scale
    x = torch.cat([spread, ties, SPECIAL])
    values = frozen(x)
    assert torch.equal(values, by_formula(x, levels, scale, zero_point))
    assert not bool(torch.signbit(values[values == 0]).any()), "the format has no -0"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("relu", [True, False], ids=["unsigned", "signed"])
def test_it_gives_the_same_bits_as_the_trained_quantizer(
    bits: int, levels: str, relu: bool
) -> None:
    torch.manual_seed(bits)
    x = torch.randn(3, 5, 7, 7).to(memory_format=torch.channels_last)
    x = x.relu() if relu else x
    trained = ActivationQuantizer(bits, levels)  # type: ignore[arg-type]
    trained.observing = True
    trained(x)
    trained.fit()
    with torch.no_grad():
        trained.log2_scale += 0.1234
    table = trained.table()
    frozen = FrozenInputQuantizer(table["levels"], table["scale"], table["zero_point"])
    assert frozen.bits == bits
    assert frozen.uniform == (trained.learned is None)
    wide = torch.cat([3 * x.flatten(), SPECIAL])
    assert torch.equal(frozen(wide), trained(wide))
    assert torch.equal(frozen(x), trained(x))
    assert torch.equal(frozen(x.half()), trained(x.half()))


@pytest.mark.parametrize("levels", [[0, 1, 2, 3], [5, 9, 80, 200]], ids=["uniform", "learned"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_frozen_inputs_that_are_not_finite_become_nan(levels: list[int], bad: float) -> None:
    frozen = FrozenInputQuantizer(torch.tensor(levels), 0.5, 1)
    values = frozen(torch.tensor([1.0, bad, -1.0]))
    assert values.isnan().tolist() == [False, True, False]


def test_a_loaded_model_has_no_further_tensors() -> None:
    assert FrozenInputQuantizer(torch.arange(4), 0.5, 1).state_dict() == {}
