"""Cells of a quantizer's levels, and weights moved into them."""

from __future__ import annotations

import torch
from torch import Tensor

from ddqcli.quant.layout import from_rows, to_rows
from ddqcli.quant.quantizer import DDQuantizer

_DEPTH = 0.15  # of the way from a cell's border to its level


def level_values(quantizer: DDQuantizer) -> Tensor:
    """Return the values of the levels in force [G, n], ascending; the last one fills short rows."""
    levels, scale, zero_point = quantizer.effective_levels()
    n = max(map(len, levels))
    positions = torch.stack([torch.cat([row, row[-1:].expand(n - len(row))]) for row in levels])
    return (positions - zero_point[:, None]) * scale[:, None]


@torch.no_grad()
def inside_cells(quantizer: DDQuantizer, weight: Tensor, assigned: Tensor) -> Tensor:
    """Return `weight`, moved as little as needed for the quantizer to map it to `assigned`.

    A weight that the quantizer maps elsewhere comes to lie just inside the cell of its level. So
    training still starts from what the float weights know.

    Args:
        quantizer: at its bits in force.
        weight: any shape that the quantizer takes.
        assigned: a level for each weight, same shape.
    """
    low, high = _cell_borders(quantizer, assigned)
    nearest = weight.clamp(low + _DEPTH * (assigned - low), high - _DEPTH * (high - assigned))
    moved = torch.where(quantizer(weight) == assigned, weight, nearest)
    # Levels may be too close to each other for a cell to have a width in float32.
    return torch.where(quantizer(moved) == assigned, moved, assigned)


def _cell_borders(quantizer: DDQuantizer, assigned: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of the cell of each assigned level; an outer cell ends at its level."""
    values = level_values(quantizer)
    rows = to_rows(assigned, quantizer.axis, len(values))
    below = (torch.searchsorted(values, rows) - 1).clamp_min(0)
    above = torch.searchsorted(values, rows, right=True).clamp_max(values.shape[1] - 1)
    low, high = ((rows + values.gather(1, index)) / 2 for index in (below, above))
    return from_rows(low, assigned, quantizer.axis), from_rows(high, assigned, quantizer.axis)
