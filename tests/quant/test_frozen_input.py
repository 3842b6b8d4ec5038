"""A file's input quantizer gives the bits that the trained one gave, and those of the formula in float64."""

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
    """FORMAT.md's rule, in exact arithmetic: the product of a level and the scale, and halves, are exact in float64."""
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
def test_every_value_becomes_the_level_that_the_format_says(
    levels: list[int], near: float, zero_point: int, seed: int
) -> None:
    scale = float(representable_scale(torch.tensor(near)))
    fixed = FrozenInputQuantizer(torch.tensor(levels, dtype=torch.uint8), scale, zero_point)
    spread = (torch.rand(400, generator=torch.Generator().manual_seed(seed)) * 600 - 300) * scale
    ties = (torch.arange(-520.0, 520.0) / 2) * scale
    x = torch.cat([spread, ties, SPECIAL])
    found = fixed(x)
    assert torch.equal(found, by_formula(x, levels, scale, zero_point))
    assert not bool(torch.signbit(found[found == 0]).any()), "no -0, of which the format knows none"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("levels", ["learned", "uniform"])
@pytest.mark.parametrize("relu", [True, False], ids=["unsigned", "signed"])
def test_it_gives_the_bits_of_the_quantizer_it_is_made_of(
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
    fixed = FrozenInputQuantizer(table["levels"], table["scale"], table["zero_point"])
    assert fixed.bits == bits
    assert fixed.uniform == (trained.learned is None)
    wide = torch.cat([3 * x.flatten(), SPECIAL])
    assert torch.equal(fixed(wide), trained(wide))
    assert torch.equal(fixed(x), trained(x))
    assert torch.equal(fixed(x.half()), trained(x.half()))


@pytest.mark.parametrize("levels", [[0, 1, 2, 3], [5, 9, 80, 200]], ids=["uniform", "learned"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(levels: list[int], bad: float) -> None:
    fixed = FrozenInputQuantizer(torch.tensor(levels), 0.5, 1)
    found = fixed(torch.tensor([1.0, bad, -1.0]))
    assert found.isnan().tolist() == [False, True, False]


def test_a_loaded_model_has_no_further_tensors() -> None:
    assert FrozenInputQuantizer(torch.arange(4), 0.5, 1).state_dict() == {}
