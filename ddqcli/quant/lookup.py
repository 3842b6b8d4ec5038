"""Lookup tables that replace the nearest-level search of Eqn (3).

A level is a point of a grid: `value = (k - zero_point) * scale` with k in 0..255 (b_q = 8). `scale` has at most 12
significant bits, so every level and every midpoint of two levels is exact in float32. A value's half-step,
`floor(x / (scale / 2))`, then decides its nearest level exactly, and one small table replaces the search:
no U, no Kronecker product, no one-hot vector and no N x 2^b tensor is ever made.

Eqn (8) takes a level's members along when it moves, but not the values that change sides as the thresholds move. Where values lie
densely these undo the movement on average: x_q stays near x, as the straight-through gradient of x has it, and levels that follow
Eqn (8) drift. So a level gets the gradient of x_q less that of the straight line between the two levels around x. Where both move
alike nothing changes, a value on a level moves nothing, and even levels give the step LSQ's gradient (Esser et al. 2020, Eqn 3).

No level stands for NaN or an infinity: they become NaN, so that the loss shows them without the device being asked at every
step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddqcli.quant.grid import LEVEL_BITS, cell_starts
from ddqcli.quant.levels import LevelsInForce


def nearest_level_table(level: Tensor) -> Tensor:
    """Index of the nearest level for each of the 512 cells of `half_steps`; a tie goes to the upper level.

    Where a level is repeated, values below it get the first of its slots and all others the last, so that twice as many slots as
    levels say which of its two children a value would take.

    Args:
        level: [G, n] ascending whole numbers in 0..255.

    Returns:
        int64 [G, 512], values 0..n-1.
    """
    return _bin_table(level) // 2


def _bin_table(level: Tensor) -> Tensor:
    """How many levels and thresholds lie at or below each cell's lower end: 2k where x goes up to level k, 2k + 1 where down."""
    cells = cell_starts(level.device).expand(len(level), -1).contiguous()
    thresholds = torch.cat([level[:, 1:] + level[:, :-1], 2 * level[:, -1:]], 1)
    ascending = torch.stack([2 * level, thresholds], 2).flatten(1)[:, :-1].contiguous()
    return torch.searchsorted(ascending, cells, right=True)


@dataclass(frozen=True)
class LookupTables:
    """What decides where a value goes, for G groups; made from the levels once a step.

    Attributes:
        values: [G, n] the levels in force, ascending; differentiable in levels and scale.
        values_for_gates: the same, differentiable in the gates.
        by_cell: [G, 512] the nearest level's value for each cell of `half_steps`.
        bins: [G, 512] twice its place among the n, and 1 more at or above it.
        half, offset: [G, 1], see `half_steps`.
        learns: whether anything behind the values is learned.
    """

    values: Tensor
    values_for_gates: Tensor
    by_cell: Tensor
    bins: Tensor
    half: Tensor
    offset: Tensor
    learns: bool

    def split(self) -> list[LookupTables]:
        """One for each group."""
        parts = map(
            _by_row,
            (self.values, self.values_for_gates, self.by_cell, self.bins, self.half, self.offset),
        )
        return [
            LookupTables(v, gated, near, bins, h, o, self.learns)
            for v, gated, near, bins, h, o in zip(*parts, strict=True)
        ]


def _by_row(x: Tensor) -> tuple[Tensor, ...]:
    rows: tuple[Tensor, ...] = x.split(1)  # type: ignore[no-untyped-call]
    return rows


def make_lookup_tables(
    levels: Tensor, scale: Tensor, zero_point: Tensor, gates: Tensor, bits: tuple[int, ...]
) -> LookupTables:
    """What `fake_quantize` needs.

    Args:
        levels: [G, 2^b] level positions on the grid, in steps (0..255).
        scale: [G] step size, as `representable` gives it.
        zero_point: [G] whole number in 0..255, the grid point of the value 0.
        gates: [G, b] gate logits; only their gradient is used here, `bits` says how many are open.
        bits: s for each group.
    """
    values, for_gates, level = LevelsInForce.apply(levels, scale, zero_point, gates, bits)  # type: ignore[no-untyped-call]
    table = _bin_table(level)
    half, offset = scale.detach()[:, None] / 2, 2 * zero_point[:, None] + 1
    learns = (
        scale.requires_grad
        or gates.requires_grad
        or (levels.requires_grad and min(bits) < LEVEL_BITS)
    )
    return LookupTables(
        values,
        for_gates,
        values.detach().gather(1, table // 2),
        table.float(),
        half,
        offset,
        learns,
    )
