"""The level grid: scales that float32 holds exactly, cells, and the fit to a range."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import few, scales

from ddqcli.quant.grid import fit_grid, grid_cells, representable_scale
from ddqcli.quant.histogram import Histogram


@few
@given(st.floats(2.0**-100, 2.0**119, width=32))
def test_representable_scale_rounds_up_to_twelve_significant_bits(scale):
    rounded = float(representable_scale(torch.tensor(scale)))
    mantissa = torch.frexp(torch.tensor(rounded, dtype=torch.float64)).mantissa * 4096
    assert mantissa == mantissa.round()
    assert scale <= rounded < scale * (1 + 2.0**-10)
    assert float(representable_scale(torch.tensor(rounded))) == rounded


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-35, 1e38, 3.4e38])
def test_levels_stay_finite_and_distinct_at_extreme_scales(scale):
    step = representable_scale(torch.tensor([scale]))
    values = (torch.arange(256.0) - 128) * step
    assert bool(values.isfinite().all())
    assert values.unique().numel() == 256


@few
@given(
    st.floats(-(2.0**126), 2.0**126, width=32),
    st.floats(-(2.0**126), 2.0**126, width=32),
)
def test_the_fitted_grid_has_zero_as_a_point_and_spans_the_range(a, b):
    low, high = min(a, b), max(a, b)
    scale, zero_point = fit_grid(Histogram.of(np.array([low, high])))
    assert isinstance(zero_point, int)
    assert 0 <= zero_point <= 255
    assert -zero_point * scale <= low + scale / 2
    assert (255 - zero_point) * scale >= high - scale / 2


@few
@given(scales, st.integers(0, 255))
def test_the_cell_of_a_value_is_its_half_step_in_exact_arithmetic(scale, zero_point):
    x = oracle.edge_cases(scale, zero_point)
    half_steps = (x.double() / (scale / 2)).floor() + 2 * zero_point
    expected = (half_steps + 1).clamp(0, 511)
    assert torch.equal(grid_cells(x, torch.tensor(scale / 2), 2 * zero_point + 1), expected.int())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_have_a_cell_within_the_table(bad):
    cell = int(grid_cells(torch.tensor([bad]), torch.tensor(0.5), 1))
    assert 0 <= cell <= 511
