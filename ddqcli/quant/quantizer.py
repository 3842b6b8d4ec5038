"""The state of one quantized tensor: levels, gates and grid, and how they are started and re-centred."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddqcli.errors import DDQError
from ddqcli.quant.fake_quantize import fake_quantize
from ddqcli.quant.grid import GRID_STEPS, LEVEL_BITS, fit_grid, grid_cells, representable_scale
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.layout import broadcast_groups, by_group
from ddqcli.quant.level_kinds import LevelKind, grid_pattern
from ddqcli.quant.levels import effective_levels, spread_levels
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.lookup import LookupTables, make_lookup_tables, nearest_level_table
from ddqcli.quant.patterns import fit_pattern
from ddqcli.quant.straight_through import ReplaceForward

_TINY = 2.0**-126


class DDQuantizer(nn.Module):
    """Quantizes one tensor: `forward(x)` is Eqn (3) with the bits in force.

    Attributes:
        levels: [G, 2^b] level positions on the grid, in steps (the paper's q); a parameter if `kind` is "learned".
        log2_clip: [G] log2 of the clipping threshold c of Eqn (1) and Eqn (2), which is in units of x; a parameter for the
            two fixed patterns. In the logarithm, equal learning rates fit every layer.
        gate_logits: [G, b]; gate i is open where the logit is >= 0. G is 1, or the channels along `axis`.
        scale, zero_point: [G], the grid: value = (k - zero_point) * scale.
        correction: lambda of Eqn (9).

    At s = 8 = b_q the levels in force are the grid itself: 2^8 levels on 2^8 points have nothing to learn but the range.
    """

    levels: Tensor
    log2_clip: Tensor
    gate_logits: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, groups: int, max_bits: int, *, kind: LevelKind = "learned", axis: int = 0
    ) -> None:
        super().__init__()
        if not 1 <= max_bits <= LEVEL_BITS:
            raise ValueError(
                f"max_bits is {max_bits}; levels lie on an {LEVEL_BITS}-bit grid, so 1 to {LEVEL_BITS} are possible"
            )
        self.kind, self.axis, self.max_bits = kind, axis, max_bits
        self.correction = 0.0
        self.tables: LookupTables | None = None  # within `at_once`
        self.done: tuple[Tensor, Tensor] | None = None  # within `at_once`: x and what becomes of it
        self.use_compiled = (
            False  # with torch.compile: set it where the work wins the compiling back
        )
        self.gate_logits = nn.Parameter(torch.ones(groups, max_bits), requires_grad=False)
        learned = kind == "learned"
        self.levels = nn.Parameter(torch.zeros(groups, 2**max_bits), requires_grad=learned)
        self.log2_clip = nn.Parameter(torch.zeros(groups), requires_grad=not learned)
        self.register_buffer("scale", torch.ones(groups))
        self.register_buffer("zero_point", torch.zeros(groups))
        self.bits: tuple[int, ...] = (max_bits,) * groups

    @classmethod
    def from_tensor(
        cls,
        x: Tensor,
        max_bits: int,
        bits: int | None = None,
        *,
        kind: LevelKind = "learned",
        channel_axis: int | None = None,
        init: Literal["lloyd_max", "uniform"] = "lloyd_max",
    ) -> DDQuantizer:
        """A quantizer for x, fitted to it at `bits` (default: max_bits), one set of levels a channel if an axis is given."""
        groups = 1 if channel_axis is None else x.shape[channel_axis]
        quantizer = cls(groups, max_bits, kind=kind, axis=channel_axis or 0).to(x.device)
        quantizer.refit(x, (bits or max_bits,) * groups, uniform=init == "uniform")
        return quantizer

    def extra_repr(self) -> str:
        spread = sorted(set(self.bits))
        return f"{self.kind}, {len(self.bits)} group(s), {'/'.join(map(str, spread))} of {self.max_bits} bits"

    def forward(self, x: Tensor) -> Tensor:
        if self.done is not None and self.done[0] is x:
            return self.done[1]
        tables = self.tables or make_lookup_tables(*self.grid(), self.gate_logits, self.bits)
        return fake_quantize(
            x, tables, axis=self.axis, correction=self.correction, use_compiled=self.use_compiled
        )

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Level positions [G, 2^b], scale [G] and zero point [G] in force, differentiable in what is learned."""
        if self.kind == "learned":
            if LEVEL_BITS not in self.bits:
                return self.levels, self.scale, self.zero_point
            identity = torch.arange(GRID_STEPS + 1.0, device=self.levels.device)
            if set(self.bits) == {LEVEL_BITS}:
                return identity + 0 * self.levels, self.scale, self.zero_point
            whole = torch.tensor([s == LEVEL_BITS for s in self.bits], device=self.levels.device)
            return torch.where(whole[:, None], identity, self.levels), self.scale, self.zero_point
        rows, units = zip(
            *(grid_pattern(self.kind, s, self.max_bits) for s in self.bits), strict=True
        )
        levels = torch.tensor(np.stack(rows), dtype=torch.float32, device=self.log2_clip.device)
        unit = torch.tensor(units, dtype=torch.float32, device=self.log2_clip.device)
        scale = torch.exp2(self.log2_clip) / unit
        scale = ReplaceForward.apply(scale, representable_scale(scale.detach()))  # type: ignore[no-untyped-call]
        return levels, scale, torch.full_like(self.zero_point, (GRID_STEPS + 1) // 2)

    def effective_levels(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """For each group the levels in force, ascending whole numbers [2^s]; scale [G]; zero point [G]. No gradients."""
        levels, scale, zero_point = (t.detach() for t in self.grid())
        return effective_levels(levels, self.bits), scale, zero_point

    @torch.no_grad()
    def indices(self, x: Tensor) -> Tensor:
        """k, the one-hot index of Eqn (3), of every value: uint8, shape of x. Raises DDQError where x is not finite."""
        check_finite(x)
        levels, scale, zero_point = self.effective_levels()
        cell = grid_cells(
            x,
            broadcast_groups(scale / 2, x, self.axis),
            broadcast_groups(2 * zero_point + 1, x, self.axis),
        )
        grouped = by_group(cell, self.axis, len(self.bits))
        tables = [nearest_level_table(level[None])[0].to(torch.uint8) for level in levels]
        rows = [table.index_select(0, c) for table, c in zip(tables, grouped, strict=True)]
        if len(rows) == 1:
            return rows[0].view(x.shape)
        moved = x.movedim(self.axis, 0).shape
        return torch.stack(rows).view(moved).movedim(0, self.axis)

    @torch.no_grad()
    def update_bits(self) -> None:
        """Take the bits from the gate logits: s is the number of open gates, at least 1 (a 0-bit layer holds nothing)."""
        self.bits = tuple(int(n) for n in (self.gate_logits >= 0).sum(1).clamp_min(1))

    @torch.no_grad()
    def refit(self, x: Tensor, bits: tuple[int, ...] | int, *, uniform: bool = False) -> None:
        """Set the bits and fit grid and levels to x (Lloyd-Max, or `uniform` over its range as the paper starts).

        Raises DDQError where x is not finite.
        """
        check_finite(x)
        bits = (bits,) * len(self.bits) if isinstance(bits, int) else bits
        for g, (row, s) in enumerate(
            zip(by_group(x.detach(), self.axis, len(self.bits)), bits, strict=True)
        ):
            distribution = (
                Histogram.of(row.float().cpu().numpy())
                if row.numel()
                else Histogram.of(np.zeros(1))
            )
            if self.kind == "learned":
                scale, zero_point = fit_grid(distribution)
                self.scale[g], self.zero_point[g] = scale, zero_point
                fitted = (
                    np.arange(2**s) * (GRID_STEPS / max(2**s - 1, 1))
                    if uniform or s == LEVEL_BITS
                    else (lloyd_max(distribution, 2**s) / scale + zero_point)
                )
                self.levels[g] = torch.from_numpy(spread_levels(fitted, 2**self.max_bits))
            else:
                row_pattern, unit = grid_pattern(self.kind, s, s)
                best = fit_pattern(distribution, row_pattern - (GRID_STEPS + 1) // 2)
                step = float(best.max() / (row_pattern.max() - (GRID_STEPS + 1) // 2))
                self.log2_clip[g] = math.log2(max(step * unit, 2.0**-99))
            self.gate_logits[g, :s].abs_()
            self.gate_logits[g, s:] = (
                -self.gate_logits[g, s:].abs().clamp_min(_TINY)
            )  # -0 would count as open
        self.bits = tuple(bits)


def check_finite(x: Tensor) -> None:
    """Raise DDQError if x holds NaN or infinite values. Waits for the device: not for every training step."""
    if not x.numel():
        return
    low, high = torch.aminmax(x.detach())  # one pass, no mask; NaN if x holds one
    if bool((low * 0 + high * 0).isnan()):
        bad = int((~x.isfinite()).sum())
        raise DDQError(
            f"{bad} of {x.numel()} values to be quantized are NaN or infinite, and no level is near those; "
            "start from a checkpoint without them, or train with a smaller train.lr."
        )
