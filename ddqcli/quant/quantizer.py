"""The state of one quantized tensor: levels, gates and grid, and how they are started and re-centred."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddqcli.errors import DDQError
from ddqcli.quant.fit import Distribution, lloyd_max, power_of_two_pattern, scaled, squared_error, uniform_pattern
from ddqcli.quant.functional import (
    LEVEL_BITS,
    MANY,
    STEPS,
    Tables,
    along,
    by_group,
    effective_levels,
    fake_quantize,
    fake_quantize_all,
    half_steps,
    make_tables,
    nearest_table,
    representable,
)

Kind = Literal["learned", "uniform", "power_of_two"]

# With more bits, Eqn (2) has no level on the 8-bit grid that it has not with these.
MOST_BITS: dict[Kind, int] = {"learned": LEVEL_BITS, "uniform": LEVEL_BITS, "power_of_two": 4}

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

    def __init__(self, groups: int, max_bits: int, *, kind: Kind = "learned", axis: int = 0) -> None:
        super().__init__()
        if not 1 <= max_bits <= LEVEL_BITS:
            raise ValueError(
                f"max_bits is {max_bits}; levels lie on an {LEVEL_BITS}-bit grid, so 1 to {LEVEL_BITS} are possible"
            )
        self.kind, self.axis, self.max_bits = kind, axis, max_bits
        self.correction = 0.0
        self.tables: Tables | None = None  # within `at_once`
        self.done: tuple[Tensor, Tensor] | None = None  # within `at_once`: x and what becomes of it
        self.fuse = False  # with torch.compile: set it where the work wins the compiling back
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
        kind: Kind = "learned",
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
        tables = self.tables or make_tables(*self.grid(), self.gate_logits, self.bits)
        return fake_quantize(x, tables, axis=self.axis, correction=self.correction, fuse=self.fuse)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Level positions [G, 2^b], scale [G] and zero point [G] in force, differentiable in what is learned."""
        if self.kind == "learned":
            if LEVEL_BITS not in self.bits:
                return self.levels, self.scale, self.zero_point
            identity = torch.arange(STEPS + 1.0, device=self.levels.device)
            if set(self.bits) == {LEVEL_BITS}:
                return identity + 0 * self.levels, self.scale, self.zero_point
            whole = torch.tensor([s == LEVEL_BITS for s in self.bits], device=self.levels.device)
            return torch.where(whole[:, None], identity, self.levels), self.scale, self.zero_point
        rows, units = zip(*(_pattern(self.kind, s, self.max_bits) for s in self.bits), strict=True)
        levels = torch.tensor(np.stack(rows), dtype=torch.float32, device=self.log2_clip.device)
        unit = torch.tensor(units, dtype=torch.float32, device=self.log2_clip.device)
        scale = torch.exp2(self.log2_clip) / unit
        scale = _Exactly.apply(scale, representable(scale.detach()))  # type: ignore[no-untyped-call]
        return levels, scale, torch.full_like(self.zero_point, (STEPS + 1) // 2)

    def effective_levels(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """For each group the levels in force, ascending whole numbers [2^s]; scale [G]; zero point [G]. No gradients."""
        levels, scale, zero_point = (t.detach() for t in self.grid())
        return effective_levels(levels, self.bits), scale, zero_point

    @torch.no_grad()
    def indices(self, x: Tensor) -> Tensor:
        """k, the one-hot index of Eqn (3), of every value: uint8, shape of x. Raises DDQError where x is not finite."""
        check_finite(x)
        levels, scale, zero_point = self.effective_levels()
        cell = half_steps(x, along(scale / 2, x, self.axis), along(2 * zero_point + 1, x, self.axis))
        grouped = by_group(cell, self.axis, len(self.bits))
        tables = [nearest_table(level[None])[0].to(torch.uint8) for level in levels]
        rows = [table.index_select(0, c) for table, c in zip(tables, grouped, strict=True)]
        if len(rows) == 1:
            return rows[0].view(x.shape)
        moved = x.movedim(self.axis, 0).shape
        return torch.stack(rows).view(moved).movedim(0, self.axis)

    @torch.no_grad()
    def read_gates(self) -> None:
        """Take the bits from the gate logits: s is the number of open gates, at least 1 (a 0-bit layer holds nothing)."""
        self.bits = tuple(int(n) for n in (self.gate_logits >= 0).sum(1).clamp_min(1))

    @torch.no_grad()
    def refit(self, x: Tensor, bits: tuple[int, ...] | int, *, uniform: bool = False) -> None:
        """Set the bits and fit grid and levels to x (Lloyd-Max, or `uniform` over its range as the paper starts).

        Raises DDQError where x is not finite.
        """
        check_finite(x)
        bits = (bits,) * len(self.bits) if isinstance(bits, int) else bits
        for g, (row, s) in enumerate(zip(by_group(x.detach(), self.axis, len(self.bits)), bits, strict=True)):
            distribution = Distribution.of(row.float().cpu().numpy()) if row.numel() else Distribution.of(np.zeros(1))
            if self.kind == "learned":
                scale, zero_point = fitting_grid(distribution)
                self.scale[g], self.zero_point[g] = scale, zero_point
                fitted = (
                    np.arange(2**s) * (STEPS / max(2**s - 1, 1))
                    if uniform or s == LEVEL_BITS
                    else (lloyd_max(distribution, 2**s) / scale + zero_point)
                )
                self.levels[g] = torch.from_numpy(spread_runs(fitted, 2**self.max_bits))
            else:
                row_pattern, unit = _pattern(self.kind, s, s)
                best = scaled(distribution, row_pattern - (STEPS + 1) // 2)
                step = float(best.max() / (row_pattern.max() - (STEPS + 1) // 2))
                self.log2_clip[g] = math.log2(max(step * unit, 2.0**-99))
            self.gate_logits[g, :s].abs_()
            self.gate_logits[g, s:] = -self.gate_logits[g, s:].abs().clamp_min(_TINY)  # -0 would count as open
        self.bits = tuple(bits)


@contextmanager
def at_once(weights: Iterable[tuple[DDQuantizer, Tensor]], others: Iterable[DDQuantizer] = ()) -> Iterator[None]:
    """Within: what a step's quantizers have to compute is there, made with few calls for all of them together.

    All quantizers with one group of learned levels have their tables, and what becomes of small weights is known. Nothing that is
    learned may change within.
    """
    small: dict[int, list[tuple[DDQuantizer, Tensor]]] = {}
    alike: dict[tuple[int, ...], list[DDQuantizer]] = {}
    pairs = [*weights, *((quantizer, None) for quantizer in others)]
    for quantizer, weight in pairs:
        if quantizer.kind != "learned" or len(quantizer.bits) > 1:
            continue
        if weight is not None and weight.numel() < MANY:
            small.setdefault(quantizer.max_bits, []).append((quantizer, weight))
        else:
            alike.setdefault((quantizer.max_bits, *quantizer.bits), []).append(quantizer)
    try:
        for members in alike.values():
            for quantizer, tables in zip(members, _tables_of(members).split(), strict=True):
                quantizer.tables = tables
        for together in small.values():
            owners, tensors = zip(*together, strict=True)
            corrections = [quantizer.correction for quantizer in owners]
            found = fake_quantize_all(list(tensors), _tables_of(owners), corrections)
            for quantizer, *done in zip(owners, tensors, found, strict=True):
                quantizer.done = tuple(done)
        yield
    finally:
        for quantizer, _ in pairs:
            quantizer.tables = quantizer.done = None


def _tables_of(quantizers: Sequence[DDQuantizer]) -> Tables:
    """Tables of several quantizers of one group each, as groups."""
    parts = zip(*((*q.grid(), q.gate_logits) for q in quantizers), strict=True)
    levels, scale, zero_point, gates = (torch.cat(part) for part in parts)
    return make_tables(levels, scale, zero_point, gates, tuple(q.bits[0] for q in quantizers))


class _Exactly(torch.autograd.Function):
    """(x, y) -> y, with the gradient of x: rounding that the gradient passes straight through, without x + (y - x)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


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


def fitting_grid(distribution: Distribution) -> tuple[float, int]:
    """Scale and zero point of the 255-step grid over the values' range, widened to hold 0 as one of its points."""
    low, high = min(distribution.low, 0.0), max(distribution.high, 0.0)
    step = (high - low) / STEPS
    scale = float(representable(torch.tensor(step)))
    return scale, round(-low / max(scale, step))  # the step is the larger one where values come close to float32's end


def spread_runs(fitted: np.ndarray, n: int) -> np.ndarray:
    """n ascending levels whose run means are `fitted`: each run spread evenly within its level's cell."""
    run = n // len(fitted)
    edges = np.concatenate([[min(0.0, fitted[0])], (fitted[1:] + fitted[:-1]) / 2, [max(STEPS, fitted[-1])]])
    reach = np.minimum(fitted - edges[:-1], edges[1:] - fitted)
    offsets = (np.arange(run) + 0.5) / run * 2 - 1
    spread: np.ndarray = fitted[:, None] + reach[:, None] * offsets
    return spread.reshape(-1)


def error_curve(distribution: Distribution, bits: range, kind: Kind = "learned") -> dict[int, float]:
    """Squared error, rounding to the grid included, of the best levels at each bit-width: what the gates weigh."""
    scale, zero_point = fitting_grid(distribution)

    def error(s: int) -> float:
        if kind == "learned":
            grid = np.arange(STEPS + 1.0) - zero_point
            levels = grid if s == LEVEL_BITS else np.round(lloyd_max(distribution, 2**s, iterations=12) / scale)
            return squared_error(distribution, levels * scale)
        return squared_error(distribution, scaled(distribution, _pattern(kind, s, s)[0] - (STEPS + 1) // 2))

    return {s: error(s) for s in bits}


def _pattern(kind: Kind, s: int, max_bits: int) -> tuple[np.ndarray, float]:
    """Eqn (1) or Eqn (2) at s bits on the grid around 128, repeated to 2^max_bits, and the clip c in grid steps."""
    if kind == "uniform" and s == LEVEL_BITS:
        return np.arange(STEPS + 1.0), float(STEPS // 2)
    pattern = uniform_pattern(s) if kind == "uniform" else power_of_two_pattern(s)
    unit = STEPS // 2 // max(2 ** (s - 1) - 1, 1) * max(2 ** (s - 1) - 1, 1) if kind == "uniform" else (STEPS + 1) // 2
    positions = np.round(pattern * unit) + (STEPS + 1) // 2
    return np.repeat(positions, 2 ** (max_bits - s)), float(unit)
