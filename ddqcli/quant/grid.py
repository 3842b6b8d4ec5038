"""The 8-bit level grid: value = (k - zero_point) * scale, k in 0..255 (Eqn 4 with b_q = 8)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ddqcli.quant.histogram import Histogram

LEVEL_BITS = 8  # b_q of Eqn (4)
GRID_STEPS = 2**LEVEL_BITS - 1  # steps of the level grid
GRID_CELLS = 2 * GRID_STEPS + 2  # two half-steps per step, one below the grid, one from its top up
_SIGNIFICAND = 2**12  # see `representable_scale`


def representable_scale(scale: Tensor) -> Tensor:
    """Round `scale` up to 12 significant bits.

    Then (k - zero_point) * scale and its half-steps are exact in float32. The result is clamped to
    2^-100..2^119, where no level and no half-step overflows or underflows.
    """
    mantissa, exponent = torch.frexp(scale.clamp(2.0**-100, 2.0**119))
    return torch.ldexp(torch.ceil(mantissa * _SIGNIFICAND) / _SIGNIFICAND, exponent)


@lru_cache(maxsize=8)
def cell_starts(device: torch.device) -> Tensor:
    """Lower ends of the 512 cells of `grid_cells`, in half-steps from the lowest grid point."""
    return torch.arange(-1, GRID_CELLS - 1, device=device).float()


def grid_cells(x: Tensor, half_step: Tensor, zero_cell: Tensor | int) -> Tensor:
    """Cell of each value: 0 below the grid, else 1 + its half-step on the grid, at most 511.

    This divides and does not multiply by a reciprocal: m * scale / 2 is exact in float32 for every
    whole m in question, and correctly rounded division never carries x across such a point. The one
    exception is a quotient that underflows, |x| up to 2^-150 half-steps: it counts as 0.

    Args:
        x: values, any shape.
        half_step: half the scale, broadcast against x.
        zero_cell: the cell that starts at the value 0, 2 * zero_point + 1.

    Returns:
        int32, shape of x.
    """
    cell = torch.div(x.float(), half_step).floor_().add_(zero_cell)
    # NaN converts to an arbitrary integer, hence the second clamp.
    return cell.clamp_(0, GRID_CELLS - 1).to(torch.int32).clamp_(0, GRID_CELLS - 1)


def fit_grid(distribution: Histogram) -> tuple[float, int]:
    """Scale and zero point of the grid over the values' range, with 0 as one of its points."""
    low, high = min(distribution.low, 0.0), max(distribution.high, 0.0)
    step = (high - low) / GRID_STEPS
    scale = float(representable_scale(torch.tensor(step, dtype=torch.float32)))
    # Near float32's largest values the scale is clamped, and `step` is the larger of the two.
    return scale, round(-low / max(scale, step))
