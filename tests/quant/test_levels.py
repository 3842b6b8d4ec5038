"""Effective levels: the means of Eqn (3) against the literal matrices, and their start."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import LEVELS, few, seeded

from ddqcli.quant.levels import effective_levels, spread_levels


@pytest.mark.parametrize("kind", LEVELS)
def test_effective_levels_are_those_of_the_kronecker_product(kind):
    for b, s in oracle.all_bits():
        levels = LEVELS[kind](seeded(b * 8 + s), 2**b)
        (averaged,) = effective_levels(levels[None], (s,))
        assert torch.equal(averaged, oracle.effective(levels, s).float()), (b, s)
        assert averaged.tolist() == sorted(
            k for k in averaged.tolist() if 0 <= k <= 255 and k == int(k)
        )


def test_each_group_is_averaged_at_its_own_bits():
    levels = torch.rand(3, 16, generator=seeded(0)) * 255
    for g, averaged in enumerate(effective_levels(levels, (1, 4, 2))):
        assert torch.equal(averaged, oracle.effective(levels[g], (1, 4, 2)[g]).float())


def test_means_are_rounded_from_float64():
    """127 levels at 101.5 and one an ulp below: float32 would round the mean to a tie."""
    levels = torch.full((128,), 101.5)
    levels[5] = torch.tensor(101.5).nextafter(torch.tensor(0.0))
    levels = torch.cat([levels, torch.full((128,), 200.0)])
    assert effective_levels(levels[None], (1,))[0].tolist() == [101, 200]


@few
@given(st.lists(st.floats(0, 255), min_size=1, max_size=16), st.integers(0, 4))
def test_spread_levels_keep_the_fitted_levels_as_means_of_runs(fitted, doublings):
    fitted = np.sort(np.resize(fitted, 2 ** (len(fitted) - 1).bit_length()))
    run = 2**doublings
    spread = spread_levels(fitted, len(fitted) * run)
    np.testing.assert_allclose(spread.reshape(-1, run).mean(1), fitted, atol=1e-9)
    assert (np.diff(spread) >= -1e-9).all()
    assert spread.min() >= -1e-9
    assert spread.max() <= 255 + 1e-9
