"""DDQuantizer: levels, gates and grid of one quantized tensor, and their fit to it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddqcli.errors import DDQError
from ddqcli.quant.device_constants import device_constant
from ddqcli.quant.fake_quantize import fake_quantize
from ddqcli.quant.grid import GRID_STEPS, LEVEL_BITS, fit_grid, grid_cells, representable_scale
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.layout import broadcast_groups, by_group
from ddqcli.quant.level_kinds import PATTERN_ZERO, LevelKind, grid_pattern
from ddqcli.quant.levels import effective_levels, spread_levels
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.lookup import LookupTables, make_lookup_tables, nearest_level_table
from ddqcli.quant.patterns import fit_pattern
from ddqcli.quant.stochastic import Choice, with_choice_gradient
from ddqcli.quant.straight_through import ReplaceForward

_SMALLEST_CLIP = 2.0**-99
_TINY_LOGIT = 2.0**-126  # a closed gate's logit is below 0, and -0 would count as open


class DDQuantizer(nn.Module):
    """Quantizes one tensor: `forward(x)` is Eqn (3) at the bits in force.

    There are G groups, each with its own levels, gates and grid: 1, or one per channel along
    `axis`. At 8 bits the levels in force are the grid itself: 2^8 levels on 2^8 grid points have
    only their range to learn.

    Attributes:
        levels: [G, 2^b] grid positions in steps (the paper's q); trained if `kind` is "learned".
        log2_clip: [G] log2 of the clipping threshold c of Eqns (1) and (2), c in units of x;
            trained for the two fixed patterns. In the logarithm, one learning rate fits all layers.
        gate_logits: [G, b]; a gate is open where its logit is >= 0.
        scale, zero_point: [G] the grid, value = (k - zero_point) * scale.
        bits: s of each group, the number of its open gates; under SDQ the sampled bit-width.
        correction: lambda of Eqn (9).
        choice: of the bit-width, sampled for the current step (SDQ); None if bits do not move.
        use_compiled: use the kernels in C on a CPU. Worth it in long runs only.
        precomputed_tables: lookup tables for the current step (`batched`).
        precomputed_output: a tensor and its quantized values for the current step (`batched`).
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
                f"max_bits is {max_bits}, but levels lie on an {LEVEL_BITS}-bit grid: "
                f"1 to {LEVEL_BITS} are possible."
            )
        self.kind, self.axis, self.max_bits = kind, axis, max_bits
        self.bits: tuple[int, ...] = (max_bits,) * groups
        self.correction = 0.0
        self.choice: Choice | None = None
        self.use_compiled = False
        self.precomputed_tables: LookupTables | None = None
        self.precomputed_output: tuple[Tensor, Tensor] | None = None
        learned = kind == "learned"
        zeros = torch.zeros(groups, dtype=torch.float32)  # whatever torch's default type is
        of_gates, of_levels = zeros.new_ones(groups, max_bits), zeros.new_zeros(groups, 2**max_bits)
        self.gate_logits = nn.Parameter(of_gates, requires_grad=False)
        self.levels = nn.Parameter(of_levels, requires_grad=learned)
        self.log2_clip = nn.Parameter(zeros.clone(), requires_grad=not learned)
        self.register_buffer("scale", torch.ones_like(zeros))
        self.register_buffer("zero_point", zeros)

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
        """Return a quantizer fitted to x at `bits` (default: max_bits).

        With `channel_axis` each channel has its own levels, gates and grid. Raises DDQError if x
        is not finite.
        """
        groups = 1 if channel_axis is None else x.shape[channel_axis]
        quantizer = cls(groups, max_bits, kind=kind, axis=channel_axis or 0).to(x.device)
        quantizer.fit(x, bits or max_bits, uniform=init == "uniform")
        return quantizer

    def extra_repr(self) -> str:
        groups, low, high = len(self.bits), min(self.bits), max(self.bits)
        channels = f", {groups} channels along axis {self.axis}" if groups > 1 else ""
        bits = f"{low}" if low == high else f"{low} to {high}"
        return f"{bits} of at most {self.max_bits} bits, {self.kind} levels{channels}"

    def forward(self, x: Tensor) -> Tensor:
        x_q = self._quantized(x)
        if self.choice is None:
            return x_q
        return with_choice_gradient(x_q, self.choice, self.gate_logits)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Grid positions [G, 2^b] of the levels, scale [G] and zero point [G].

        They are differentiable in what is trained: the levels, or the clipping threshold.
        """
        return self._learned_grid() if self.kind == "learned" else self._pattern_grid()

    def gates(self) -> Tensor:
        """Gate logits [G, b], differentiable in DDQ's own way unless a choice is sampled."""
        return self.gate_logits if self.choice is None else self.gate_logits.detach()

    def effective_levels(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Levels in force of each group, ascending whole numbers [2^s]; scale and zero point [G].

        Without gradients.
        """
        levels, scale, zero_point = (t.detach() for t in self.grid())
        return effective_levels(levels, self.bits), scale, zero_point

    @torch.no_grad()
    def indices(self, x: Tensor) -> Tensor:
        """Index of each value's level, uint8 in the shape of x (x_o of Eqn 3, not one-hot).

        Raises DDQError if x is not finite.
        """
        check_finite(x)
        levels, scale, zero_point = self.effective_levels()
        cell = grid_cells(
            x,
            broadcast_groups(scale / 2, x, self.axis),
            broadcast_groups(2 * zero_point + 1, x, self.axis),
        )
        cells = by_group(cell, self.axis, len(self.bits))
        tables = [nearest_level_table(level[None])[0].to(torch.uint8) for level in levels]
        rows = [table.index_select(0, row) for table, row in zip(tables, cells, strict=True)]
        if len(rows) == 1:
            return rows[0].view(x.shape)
        moved = x.movedim(self.axis, 0).shape
        return torch.stack(rows).view(moved).movedim(0, self.axis)

    @torch.no_grad()
    def update_bits(self) -> None:
        """Set the bits to the number of open gates, at least 1: at 0 bits a tensor is constant."""
        self.bits = tuple(int(n) for n in (self.gate_logits >= 0).sum(1).clamp_min(1))

    @torch.no_grad()
    def set_bits(self, bits: tuple[int, ...]) -> None:
        """Set the bits and gates of each group; levels and range stay as they are."""
        for g, s in enumerate(bits):
            self.gate_logits[g, :s].abs_()
            self.gate_logits[g, s:] = -self.gate_logits[g, s:].abs().clamp_min(_TINY_LOGIT)
        self.bits = bits

    @torch.no_grad()
    def fit(self, x: Tensor, bits: tuple[int, ...] | int, *, uniform: bool = False) -> None:
        """Set bits and gates, and fit grid and levels to x.

        Learned levels become those of Lloyd-Max, or with `uniform` evenly spaced over the range of
        x (the paper's start). Fixed patterns get the clipping threshold of least squared error.

        Args:
            x: a tensor with the groups along `axis`. Raises DDQError if it is not finite.
            bits: s of each group, or of all.
        """
        check_finite(x)
        bits = (bits,) * len(self.bits) if isinstance(bits, int) else tuple(bits)
        rows = by_group(x.detach(), self.axis, len(self.bits))
        for g, (row, s) in enumerate(zip(rows, bits, strict=True)):
            values = row.float().cpu().numpy() if row.numel() else np.zeros(1)
            if self.kind == "learned":
                self._fit_levels(g, Histogram.of(values), s, uniform)
            else:
                self._fit_clip(g, Histogram.of(values), s)
        self.set_bits(bits)

    def _quantized(self, x: Tensor) -> Tensor:
        if self.precomputed_output is not None and self.precomputed_output[0] is x:
            return self.precomputed_output[1]
        tables = self.precomputed_tables
        if tables is None:
            tables = make_lookup_tables(*self.grid(), self.gates(), self.bits)
        return fake_quantize(
            x, tables, axis=self.axis, correction=self.correction, use_compiled=self.use_compiled
        )

    def _learned_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        if LEVEL_BITS not in self.bits:
            return self.levels, self.scale, self.zero_point
        identity = torch.arange(GRID_STEPS + 1, device=self.levels.device).float()
        if set(self.bits) == {LEVEL_BITS}:
            # 0 * levels, so that the levels get a gradient of zeros.
            return identity + 0 * self.levels, self.scale, self.zero_point
        at_most = tuple(s == LEVEL_BITS for s in self.bits)
        whole = device_constant(at_most, self.levels.device, torch.bool)
        return torch.where(whole[:, None], identity, self.levels), self.scale, self.zero_point

    def _pattern_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        patterns = [grid_pattern(self.kind, s, self.max_bits) for s in self.bits]
        positions, clip_steps = zip(*patterns, strict=True)
        device = self.log2_clip.device
        levels = torch.stack(
            [device_constant(tuple(row.tolist()), device, torch.float32) for row in positions]
        )
        steps = device_constant(tuple(map(float, clip_steps)), device, torch.float32)
        scale = torch.exp2(self.log2_clip) / steps
        scale = ReplaceForward.apply(scale, representable_scale(scale.detach()))
        return levels, scale, torch.full_like(self.zero_point, PATTERN_ZERO)

    def _fit_levels(self, g: int, distribution: Histogram, s: int, uniform: bool) -> None:
        scale, zero_point = fit_grid(distribution)
        if uniform or s == LEVEL_BITS:
            positions = np.arange(2**s) * (GRID_STEPS / max(2**s - 1, 1))
        else:
            positions = lloyd_max(distribution, 2**s) / scale + zero_point
        self.scale[g], self.zero_point[g] = scale, zero_point
        self.levels[g] = torch.from_numpy(spread_levels(positions, 2**self.max_bits))

    def _fit_clip(self, g: int, distribution: Histogram, s: int) -> None:
        positions, clip_steps = grid_pattern(self.kind, s, s)
        pattern = positions - PATTERN_ZERO
        step = float(fit_pattern(distribution, pattern).max() / pattern.max())
        self.log2_clip[g] = math.log2(max(step * clip_steps, _SMALLEST_CLIP))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.update_bits()


def check_finite(x: Tensor) -> None:
    """Raise DDQError if x holds NaN or infinity. Synchronizes with the device."""
    if not x.numel():
        return
    low, high = torch.aminmax(x.detach())  # one pass without a mask; NaN if x holds one
    if bool((low * 0 + high * 0).isnan()):
        bad = int((~x.isfinite()).sum())
        raise DDQError(
            f"{bad} of {x.numel()} values to be quantized are NaN or infinite, and no level is "
            "near those; start from a checkpoint without them, or train with a smaller train.lr."
        )
