"""Lookup tables that replace the nearest-level search of Eqn (3).

A level is a grid point: value = (k - zero_point) * scale with k in 0..255 (b_q = 8). The scale has
at most 12 significant bits, so every level and every midpoint of two levels is exact in float32.
Midpoints lie on half-steps of the grid. So a value's half-step, floor(x / (scale / 2)), decides its
nearest level exactly, and a table with one entry per half-step replaces the argmin: U, the
Kronecker product, the one-hot vector and an N x 2^b tensor of distances are never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddqcli.quant.grid import GRID_CELLS, LEVEL_BITS, cell_starts
from ddqcli.quant.levels import EffectiveLevels


@dataclass(frozen=True)
class CellTables:
    """The nearest level for each of the 512 cells of `grid_cells`, for G groups. No gradients.

    Attributes:
        nearest_value: [G, 512] value of the nearest level.
        bin: [G, 512] 2k for a cell rounded up to level k; 2k + 1 for a cell rounded down to it.
        half_step: [G, 1] half the scale.
        zero_cell: [G, 1] the cell that starts at the value 0.
    """

    nearest_value: Tensor
    bin: Tensor
    half_step: Tensor
    zero_cell: Tensor

    def group_index(self) -> Tensor:
        """0..G-1 as [G, 1], int32."""
        groups, device = len(self.half_step), self.half_step.device
        return torch.arange(groups, device=device, dtype=torch.int32)[:, None]

    def addressing(self) -> tuple[Tensor, Tensor, Tensor]:
        """[G, 1] each: half-step, zero cell, and the row's first cell in the flattened tables."""
        return self.half_step, self.zero_cell, GRID_CELLS * self.group_index()


@dataclass(frozen=True)
class LookupTables:
    """Levels in force, and the nearest-level table, for G groups. Precomputed once per step.

    Attributes:
        values: [G, n] the levels in force, ascending; differentiable in levels and scale.
        values_for_gates: [G, n] the same, differentiable in the gates.
        cells: the nearest level for each cell of the grid.
        learned: True if training moves levels, scale or gates. Levels at 8 bits are the grid.
    """

    values: Tensor
    values_for_gates: Tensor
    cells: CellTables
    learned: bool

    def split(self) -> list[LookupTables]:
        """Return the tables of each group."""
        c = self.cells
        tensors = (
            self.values,
            self.values_for_gates,
            c.nearest_value,
            c.bin,
            c.half_step,
            c.zero_cell,
        )
        return [
            LookupTables(values, values_for_gates, CellTables(*cells), self.learned)
            for values, values_for_gates, *cells in zip(*map(_split_rows, tensors), strict=True)
        ]


def make_lookup_tables(
    levels: Tensor, scale: Tensor, zero_point: Tensor, gates: Tensor, bits: tuple[int, ...]
) -> LookupTables:
    """Return the tables that `fake_quantize` needs.

    Args:
        levels: [G, 2^b] grid positions in steps (0..255).
        scale: [G] step size, as `representable_scale` returns it.
        zero_point: [G] whole number in 0..255, the grid position of the value 0.
        gates: [G, b] gate logits, only used for their gradient: `bits` says how many are open.
        bits: s of each group.
    """
    values, values_for_gates, grid_position = EffectiveLevels.apply(
        levels, scale, zero_point, gates, bits
    )
    bin_ = _cell_bins(grid_position)
    return LookupTables(
        values,
        values_for_gates,
        CellTables(
            nearest_value=values.detach().gather(1, bin_ // 2),
            bin=bin_.float(),
            half_step=scale.detach()[:, None] / 2,
            zero_cell=2 * zero_point[:, None] + 1,
        ),
        learned=scale.requires_grad
        or gates.requires_grad
        or (levels.requires_grad and min(bits) < LEVEL_BITS),
    )


def nearest_level_table(level: Tensor) -> Tensor:
    """Index of the nearest level for each of the 512 cells of `grid_cells`; ties go up.

    If a level is repeated, values below it get its first index and all others its last. With twice
    as many entries as levels the index so tells the two children of each level apart.

    Args:
        level: [G, n] ascending whole numbers in 0..255.

    Returns:
        int64 [G, 512], values 0..n-1.
    """
    return _cell_bins(level) // 2


def _cell_bins(level: Tensor) -> Tensor:
    """For each cell, the number of levels and thresholds at or below its lower end."""
    cells = cell_starts(level.device).expand(len(level), -1).contiguous()
    thresholds = torch.cat([level[:, 1:] + level[:, :-1], 2 * level[:, -1:]], 1)
    ascending = torch.stack([2 * level, thresholds], 2).flatten(1)[:, :-1].contiguous()
    return torch.searchsorted(ascending, cells, right=True)


def _split_rows(x: Tensor) -> tuple[Tensor, ...]:
    rows: tuple[Tensor, ...] = x.split(1)  # type: ignore[no-untyped-call]
    return rows
