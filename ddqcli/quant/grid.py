"""The 8-bit level grid: value = (k - zero_point) * scale, k in 0..255 (Eqn 4 with b_q = 8)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ddqcli.quant.histogram import Histogram

LEVEL_BITS = 8  # b_q of Eqn (4)
GRID_STEPS = 2**LEVEL_BITS - 1  # steps of the level grid
GRID_CELLS = 2 * GRID_STEPS + 2  # half-steps of the grid, and one for all that lies below it
_SIGNIFICANT = 2**12  # scale's significand, see `representable`


def representable_scale(scale: Tensor) -> Tensor:
    """`scale` rounded up to 12 significant bits, so that (k - z) * scale and its half-steps are exact in float32.

    Kept within 2^-100 and 2^119, where no level or half-step under- or overflows.
    """
    mantissa, exponent = torch.frexp(scale.clamp(2.0**-100, 2.0**119))
    return torch.ldexp(torch.ceil(mantissa * _SIGNIFICANT) / _SIGNIFICANT, exponent)


@lru_cache(maxsize=8)
def cell_starts(device: torch.device) -> Tensor:
    """Each cell of `half_steps` as its lower end, in half-steps."""
    return torch.arange(-1.0, GRID_CELLS - 1, device=device)


def grid_cells(x: Tensor, half: Tensor, offset: Tensor | int) -> Tensor:
    """The cell of each value: 0 below the grid, else 1 + its half-step on the grid, at most 511. int32, shape of x.

    Division, not multiplication by a reciprocal: m * scale / 2 is exact in float32 for the whole numbers m in question, and
    correctly rounded division never carries x across such a point. Only a quotient that underflows, |x| up to 2^-150 of a
    half-step, counts as 0.

    Args:
        half: half the scale.
        offset: the cell that starts at 0, 2 * zero_point + 1.
    """
    cell = torch.div(x.float(), half).floor_().add_(offset)
    return (
        cell.clamp_(0, GRID_CELLS - 1).to(torch.int32).clamp_(0, GRID_CELLS - 1)
    )  # of NaN, any number may be made


def fit_grid(distribution: Histogram) -> tuple[float, int]:
    """Scale and zero point of the 255-step grid over the values' range, widened to hold 0 as one of its points."""
    low, high = min(distribution.low, 0.0), max(distribution.high, 0.0)
    step = (high - low) / GRID_STEPS
    scale = float(representable_scale(torch.tensor(step)))
    return scale, round(
        -low / max(scale, step)
    )  # the step is the larger one where values come close to float32's end
