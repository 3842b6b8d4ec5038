"""DDQ's quantization function (Eqn 3) and its gradients (Eqn 8 and 9, the gates' finite differences).

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

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ddqcli.quant.fusion import fused

LEVEL_BITS = 8  # b_q of Eqn (4)
STEPS = 2**LEVEL_BITS - 1  # steps of the level grid
CELLS = 2 * STEPS + 2  # half-steps of the grid, and one for all that lies below it
_SIGNIFICANT = 2**12  # scale's significand, see `representable`


def representable(scale: Tensor) -> Tensor:
    """`scale` rounded up to 12 significant bits, so that (k - z) * scale and its half-steps are exact in float32.

    Kept within 2^-100 and 2^119, where no level or half-step under- or overflows.
    """
    mantissa, exponent = torch.frexp(scale.clamp(2.0**-100, 2.0**119))
    return torch.ldexp(torch.ceil(mantissa * _SIGNIFICANT) / _SIGNIFICANT, exponent)


def effective_levels(levels: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
    """Levels in force for each group: sorted, averaged over runs of 2^(b - s) (Eqn 3's U / Z_U), rounded to the grid (R).

    Args:
        levels: [G, 2^b] positions on the grid, in steps, in any order.
        bits: s for each of the G groups, 1 <= s <= b.

    Returns:
        For each group [2^s] ascending whole numbers in 0..255, as float32.
    """
    ordered = levels.detach().float().sort(dim=1).values
    return [_merged(row[None], s, 2**s)[0] for row, s in zip(ordered, bits, strict=True)]


def _in_force(ordered: Tensor, bits: tuple[int, ...], slots: int) -> Tensor:
    """`effective_levels` of sorted levels [G, 2^b], each repeated as often as fills [G, slots]."""
    level = ordered.new_empty(len(ordered), slots)
    for s, rows in _rows_of(bits):
        level[rows] = _merged(ordered[rows], s, slots)
    return level


def _merged(ordered: Tensor, s: int, slots: int) -> Tensor:
    n = 2**s
    mean = ordered.view(len(ordered), n, -1).mean(2, dtype=torch.float64)  # float32 can round to a tie that is none
    level = mean.round_().clamp_(0, STEPS).add_(0.0).float()  # and not -0
    return level if slots == n else level.repeat_interleave(slots // n, dim=1)


def nearest_table(level: Tensor) -> Tensor:
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
    cells = _cells(level.device).expand(len(level), -1).contiguous()
    thresholds = torch.cat([level[:, 1:] + level[:, :-1], 2 * level[:, -1:]], 1)
    ascending = torch.stack([2 * level, thresholds], 2).flatten(1)[:, :-1].contiguous()
    return torch.searchsorted(ascending, cells, right=True)


@lru_cache(maxsize=8)
def _cells(device: torch.device) -> Tensor:
    """Each cell of `half_steps` as its lower end, in half-steps."""
    return torch.arange(-1.0, CELLS - 1, device=device)


def half_steps(x: Tensor, half: Tensor, offset: Tensor | int) -> Tensor:
    """The cell of each value: 0 below the grid, else 1 + its half-step on the grid, at most 511. int32, shape of x.

    Division, not multiplication by a reciprocal: m * scale / 2 is exact in float32 for the whole numbers m in question, and
    correctly rounded division never carries x across such a point. Only a quotient that underflows, |x| up to 2^-150 of a
    half-step, counts as 0.

    Args:
        half: half the scale.
        offset: the cell that starts at 0, 2 * zero_point + 1.
    """
    cell = torch.div(x.float(), half).floor_().add_(offset)
    return cell.clamp_(0, CELLS - 1).to(torch.int32).clamp_(0, CELLS - 1)  # of NaN, any number may be made


class _LevelsInForce(torch.autograd.Function):
    """(levels, gates) -> A_s (Eqn 3's R(q U / Z_U)), as values [G, slots]; back, Eqn (8)'s 1 / Z_U and the gates' differences.

    The values come twice, because levels and gates get different gradients of x_q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        levels: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        gates: Tensor,
        bits: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ordered, order = levels.detach().float().sort(dim=1, stable=True)
        max_bits = (levels.shape[1] - 1).bit_length()
        finest = max(min(s + gates.requires_grad, max_bits) for s in bits)  # the gates' gradient asks for children
        level = _in_force(ordered, bits, 2**finest)
        positions = level - zero_point[:, None]
        ctx.save_for_backward(ordered, order, scale, positions)
        ctx.bits = bits
        values, for_gates = positions * scale[:, None], positions * scale[:, None]
        ctx.mark_non_differentiable(level, *(() if gates.requires_grad else (for_gates,)))
        return values, for_gates, level

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (sums, by_slot, _), bits = grads, ctx.bits
        ordered, order, scale, positions = ctx.saved_tensors
        of_levels, of_scale, _, of_gates = ctx.needs_input_grad[:4]
        return (
            _levels_grad(sums, ordered, order, scale, bits) if of_levels else None,
            (sums * positions).sum(1) if of_scale else None,
            None,
            _gates_grad(by_slot, ordered, scale, bits) if of_gates else None,
            None,
        )


@dataclass(frozen=True)
class Tables:
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

    def split(self) -> list[Tables]:
        """One for each group."""
        parts = map(_by_row, (self.values, self.values_for_gates, self.by_cell, self.bins, self.half, self.offset))
        return [
            Tables(v, gated, near, bins, h, o, self.learns) for v, gated, near, bins, h, o in zip(*parts, strict=True)
        ]


def _by_row(x: Tensor) -> tuple[Tensor, ...]:
    rows: tuple[Tensor, ...] = x.split(1)  # type: ignore[no-untyped-call]
    return rows


def make_tables(levels: Tensor, scale: Tensor, zero_point: Tensor, gates: Tensor, bits: tuple[int, ...]) -> Tables:
    """What `fake_quantize` needs.

    Args:
        levels: [G, 2^b] level positions on the grid, in steps (0..255).
        scale: [G] step size, as `representable` gives it.
        zero_point: [G] whole number in 0..255, the grid point of the value 0.
        gates: [G, b] gate logits; only their gradient is used here, `bits` says how many are open.
        bits: s for each group.
    """
    values, for_gates, level = _LevelsInForce.apply(levels, scale, zero_point, gates, bits)  # type: ignore[no-untyped-call]
    table = _bin_table(level)
    half, offset = scale.detach()[:, None] / 2, 2 * zero_point[:, None] + 1
    learns = scale.requires_grad or gates.requires_grad or (levels.requires_grad and min(bits) < LEVEL_BITS)
    return Tables(values, for_gates, values.detach().gather(1, table // 2), table.float(), half, offset, learns)


def _snap(x: Tensor, by_cell: Tensor, half: Tensor, offset: Tensor, base: Tensor) -> Tensor:
    """The nearest level's value for each value of x [G, M]; NaN for what is not finite. `base`: where a row's table starts."""
    found = by_cell.view(-1).index_select(0, _cell(x, half, offset, base)).view(x.shape)
    return torch.add(found, x, alpha=-0.0).to(x.dtype)


def _snap_to_few(x: Tensor, values: Tensor) -> Tensor:
    """`_snap` of [1, M] to [1, n] values by a comparison with each threshold: to be fused."""
    return torch.add(_highest(_reached(x, values), values), x, alpha=-0.0).to(x.dtype)


def _reached(x: Tensor, values: Tensor) -> list[Tensor]:
    """Whether x [1, M] is at or above each of the n - 1 thresholds between n values, which are exact in float32."""
    return [x >= threshold for threshold in ((values[:, 1:] + values[:, :-1]) / 2).unbind(1)]


def _highest(reached: list[Tensor], values: Tensor) -> Tensor:
    found = values[:, :1].expand_as(reached[0])
    for k, at_or_above in enumerate(reached, 1):
        found = torch.where(at_or_above, values[:, k], found)
    return found


def _cell(x: Tensor, half: Tensor, offset: Tensor, base: Tensor) -> Tensor:
    return (half_steps(x, half, offset) + base).view(-1)


def _inside(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """grad where low <= x <= high, 0 elsewhere."""
    return torch.where((x >= low) & (x <= high), grad, 0.0)


def _straight(grad: Tensor, x: Tensor, residual: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and for `_by_level`: grad (x - x_q) where low <= x <= high, grad itself beyond. `residual`: x_q - x."""
    inside = (x >= low) & (x <= high)
    return torch.where(inside, grad, 0.0), torch.where(inside, -residual, 1.0) * grad.float()


def _parts(
    kind: torch.dtype,
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    half: Tensor,
    offset: Tensor,
    base: Tensor,
    by_cell: Tensor,
    bins: Tensor,
    correction: Tensor | None,
) -> tuple[Tensor, ...]:
    """Each value's bin as `kind`, `_straight` of it and, with a correction, Eqn (9); all [G, M].

    Only x is kept for this: with the tables it says all over again what became of each value.
    """
    cell = _cell(x, half, offset, base)
    residual = by_cell.view(-1).index_select(0, cell).view(x.shape) - x
    found = bins.view(-1).index_select(0, cell).view(x.shape).to(kind), *_straight(grad, x, residual, low, high)
    return found if correction is None else (*found, correction * residual)


def _parts_of_few(grad: Tensor, x: Tensor, values: Tensor, correction: Tensor | None) -> tuple[Tensor, ...]:
    """The gradient of x [1, M], the sums [1, n + 1] by gap of n values and, with a correction, [1, n] by level: to be fused."""
    reached = _reached(x, values)
    residual = _highest(reached, values) - x
    grad_x, to_gap = _straight(grad, x, residual, values[:, :1], values[:, -1:])
    by_gap = _masked_sums(to_gap, [x >= value for value in values.unbind(1)])
    return (grad_x, by_gap) if correction is None else (grad_x, by_gap, _masked_sums(correction * residual, reached))


def _masked_sums(of: Tensor, above: list[Tensor]) -> Tensor:
    """[1, k + 1] sums of [1, M] between k ascending thresholds, of which each value is at or `above` some."""
    members = [~above[0], *(a & ~b for a, b in itertools.pairwise(above)), above[-1]]
    return torch.stack([torch.where(member, of, 0.0).sum(1) for member in members], 1)


def _gap_sums(by_bin: Tensor) -> Tensor:
    """Sums by bin [G, 2n] as sums below, between and above the n levels, [G, n + 1]."""
    inner = by_bin[:, 1:-1].reshape(len(by_bin), -1, 2).sum(2)
    return torch.cat([by_bin[:, :1], inner, by_bin[:, -1:]], 1)


def _by_level(by_gap: Tensor, values: Tensor) -> Tensor:
    """Sums [G, n + 1] of what `_straight` finds below, between and above n values [G, n] as what each value gets.

    Let x = (1 - t) q + t q' be between q and q'. If q is nearer, x_q less the line is t q - t q', else (1 - t) q' - (1 - t) q:
    either way q has the factor (x - x_q) / (q' - q), and q' the same negated. Beyond the ends x_q is the end alone.
    """
    width = values.diff(dim=1)
    shares = torch.where(width > 0, by_gap[:, 1:-1] / width, 0.0)
    return torch.cat([shares, by_gap[:, -1:]], 1) - torch.cat([-by_gap[:, :1], shares], 1)


_FEW = 16  # levels up to which a fused comparison with each is faster than memory
MANY = 2**16  # values from which on kernels of their own are worth their calls


class _FakeQuantize(torch.autograd.Function):
    """x -> the nearest of `values`; back to x, to the values (Eqn 8 less the straight line, Eqn 9) and to those for the gates.

    Takes one x with G groups, or G of them with one group each, which go through the kernels as one row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        values_for_gates: Tensor,
        by_cell: Tensor,
        bins: Tensor,
        half: Tensor,
        offset: Tensor,
        correction: Tensor,
        axis: int,
        learns: bool,
        corrects: bool,
        fuse: bool,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, by_cell, bins, half, offset, correction, *xs)
        ctx.constants = (axis, learns, corrects, fuse)
        ctx.set_materialize_grads(False)
        kind, row = half.device.type, _row(xs, xs, axis, len(values))
        if fuse and len(values) == 1 and values.shape[1] <= _FEW:
            return _parted(fused(_snap_to_few, kind)(row, values), xs, axis)
        base = CELLS * torch.arange(len(values), device=half.device, dtype=torch.int32)[:, None]
        snap = fused(_snap, kind) if fuse else _snap
        return _parted(snap(row, by_cell, *_spread([half, offset, base], xs)), xs, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, by_cell, bins, half, offset, correction, *xs = ctx.saved_tensors
        axis, learns, corrects, fuse = ctx.constants
        kind, (groups, count) = half.device.type, values.shape
        known = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, xs, strict=True)]
        pair = _row(known, xs, axis, groups), _row(xs, xs, axis, groups)
        wanted, gated = ctx.needs_input_grad[:2]
        of_values = of_gates = None
        if not (wanted and learns):
            ends = _spread([values[:, :1], values[:, -1:]], xs)
            grad_x = (fused(_inside, kind) if fuse else _inside)(*pair, *ends)
            of_values = torch.zeros_like(values) if wanted else None
        elif fuse and groups == 1 and count <= _FEW and not gated:
            grad_x, by_gap, *by_code = fused(_parts_of_few, kind)(*pair, values, correction if corrects else None)
            of_values = _by_level(by_gap, values) + sum(by_code)
        else:
            group = torch.arange(groups, device=half.device, dtype=torch.int32)[:, None]
            spread = [values[:, :1], values[:, -1:], half, offset, CELLS * group, correction[:, None]]
            *where, factor = _spread(spread, xs)
            small = torch.uint8 if groups * 2 * count <= 256 else torch.int32
            kernel: Callable[..., Any] = fused(_parts, kind) if fuse else _parts
            found = kernel(small, *pair, *where, by_cell, bins + 2 * count * group, factor if corrects else None)
            bin_, grad_x, *to_sum = found
            to_sum += [pair[0].float()] if gated else []
            by_gap, *by_code = (s.view(groups, -1) for s in _sums(to_sum, bin_, groups * 2 * count))
            by_code = [s.view(groups, count, 2).sum(2) for s in by_code]
            of_values = _by_level(_gap_sums(by_gap), values) + (by_code[0] if corrects else 0)
            of_gates = sum(by_code) if gated else None
        of_xs = zip(grads, _parted(grad_x, xs, axis), strict=True)
        return of_values, of_gates, *(None,) * 9, *(None if grad is None else of_x for grad, of_x in of_xs)


def fake_quantize(x: Tensor, tables: Tables, *, axis: int = 0, correction: float = 0.0, fuse: bool = False) -> Tensor:
    """Eqn (3): each value replaced by the nearest level in force, bit for bit a member of the level set.

    NaN and infinities become NaN. For the backward only x is kept, which a float layer keeps as well.

    Args:
        x: values, any shape.
        tables: of 1 group, or of x.shape[axis].
        axis: the axis of x that the groups follow.
        correction: lambda of Eqn (9), in units of the loss per squared unit of x.
        fuse: go over the values with kernels of torch.compile, if there are enough of them.

    Gradients: to x where A_0 <= x <= A_last; to levels that of x_q less the straight line between the two around x (of x_q alone
    where x is beyond them), and Eqn (9), divided by the run length; to the gates s and s + 1 the finite differences
    A_s - A_(s-1) and A_(s+1) - A_s, none to the others.

    >>> levels, one = torch.tensor([[0.0, 10.0, 20.0, 30.0]]), torch.ones(1)
    >>> fake_quantize(torch.tensor([4.9, 5.0, 99.0]), make_tables(levels, one, 0 * one, torch.ones(1, 2), (2,)))
    tensor([ 0., 10., 30.])
    >>> fake_quantize(torch.tensor([4.9, 5.0, 99.0]), make_tables(levels, one, 0 * one, torch.ones(1, 2), (1,)))
    tensor([ 5.,  5., 25.])
    """
    return _apply([x], tables, [correction], axis, fuse and x.numel() >= MANY)[0]


def fake_quantize_all(xs: list[Tensor], tables: Tables, corrections: list[float]) -> tuple[Tensor, ...]:
    """`fake_quantize` of several small tensors, one group each, for little more than the price of one.

    Args:
        xs: G tensors of any shapes.
        tables: of G groups.
        corrections: G of `fake_quantize`'s.
    """
    return _apply(xs, tables, corrections, 0, False)


def _apply(xs: list[Tensor], tables: Tables, corrections: list[float], axis: int, fuse: bool) -> tuple[Tensor, ...]:
    t = tables
    of_one = len(corrections) == 1  # is filled in by the device itself, without waiting for it
    factors = t.half.new_full((1,), corrections[0]) if of_one else t.half.new_tensor(corrections)
    out: tuple[Tensor, ...] = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        t.values, t.values_for_gates, t.by_cell, t.bins, t.half, t.offset, factors, axis, t.learns, any(corrections), fuse, *xs
    )  # fmt: skip
    return out


def _spread(of_groups: list[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Each [G, 1] as it is for one x, or for several as the one row [1, N] that they make."""
    if len(xs) == 1:
        return of_groups
    sizes = torch.tensor([x.numel() for x in xs], device=xs[0].device)
    total = sum(x.numel() for x in xs)
    return [t.view(-1).repeat_interleave(sizes, output_size=total)[None] for t in of_groups]


def _row(tensors: Sequence[Tensor], like: Sequence[Tensor], axis: int, groups: int) -> Tensor:
    """One tensor as [groups, M], or several as one row [1, N]; in the memory order of `like`."""
    if len(tensors) == 1:
        return to_rows(laid_like(tensors[0], like[0]), axis, groups)
    return torch.cat([to_rows(laid_like(x, pattern), 0, 1) for x, pattern in zip(tensors, like, strict=True)], 1)


def _parted(row: Tensor, xs: Sequence[Tensor], axis: int) -> tuple[Tensor, ...]:
    """The inverse of `_row`."""
    if len(xs) == 1:
        return (from_rows(row, xs[0], axis),)
    parts = row.split([x.numel() for x in xs], 1)  # type: ignore[no-untyped-call]
    return tuple(from_rows(part.clone(), x, 0) for part, x in zip(parts, xs, strict=True))


def by_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], the groups along `axis`."""
    return x.reshape(1, -1) if groups == 1 else x.movedim(axis, 0).reshape(groups, -1)


def to_rows(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], in the order of its memory where that is possible without a copy."""
    if _is_rows(x, axis, groups):
        return x.as_strided((groups, x.numel() // groups), (x.numel() // groups, 1))
    return by_group(x, axis, groups).contiguous()


def from_rows(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `to_rows`, for any values in `rows`."""
    if _is_rows(like, axis, len(rows)):
        return rows.as_strided(like.shape, like.stride())
    return rows.view(like.shape) if len(rows) == 1 else rows.view(like.movedim(axis, 0).shape).movedim(0, axis)


def _is_rows(x: Tensor, axis: int, groups: int) -> bool:
    """Whether x lies in memory without gaps, each group in one piece."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous() or (x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]))
    return dense and x.numel() > 0 and (groups == 1 or axis == 0)


def laid_like(x: Tensor, pattern: Tensor) -> Tensor:
    """x as it has to lie in memory for `to_rows` to take it apart as it does `pattern`."""
    if x.stride() == pattern.stride():
        return x
    return torch.empty_like(pattern, dtype=x.dtype).copy_(x) if _is_rows(pattern, 0, 1) else x.contiguous()


def along(per_group: Tensor, like: Tensor, axis: int) -> Tensor:
    """[G] broadcast against `like` along `axis`."""
    if len(per_group) == 1:
        return per_group.view(())
    shape = [1] * like.ndim
    shape[axis] = -1
    return per_group.view(shape)


def _sums(parts: Sequence[Tensor], code: Tensor, count: int) -> list[Tensor]:
    """For each part [count] float32: its sums by code."""
    index = code.reshape(-1)
    if code.is_cpu:
        return [torch.bincount(index, weights=part.reshape(-1), minlength=count).float() for part in parts]
    index = index.long()
    return [torch.zeros(count, device=code.device).scatter_add_(0, index, part.reshape(-1)) for part in parts]


def _folded(sums: Tensor, s: int) -> Tensor:
    """Sums by slot as sums by level: [G, n] -> [G, 2^s]."""
    return sums if sums.shape[1] == 2**s else sums.view(len(sums), 2**s, -1).sum(2)


def _rows_of(bits: tuple[int, ...]) -> list[tuple[int, slice | list[int]]]:
    """Each bit-width s in force with the groups that have it."""
    if len(set(bits)) == 1:
        return [(bits[0], slice(None))]
    return [(s, [g for g, at in enumerate(bits) if at == s]) for s in sorted(set(bits))]


def _levels_grad(sums: Tensor, ordered: Tensor, order: Tensor, scale: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Eqn (8)'s 1 / Z_U: what a level in force gets is shared evenly by the 2^(b - s) stored levels of its run."""
    shared = torch.empty_like(ordered)
    n = ordered.shape[1]
    for s, rows in _rows_of(bits):
        shared[rows] = (_folded(sums[rows], s) * (2**s / n)).repeat_interleave(n >> s, dim=1)
    return torch.empty_like(ordered).scatter_(1, order, shared * scale[:, None])


def _gates_grad(sums: Tensor, ordered: Tensor, scale: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Finite differences at the boundary gates: closing gate s (index s - 1), opening gate s + 1 (index s)."""
    max_bits = (ordered.shape[1] - 1).bit_length()
    out = torch.zeros(len(bits), max_bits, device=ordered.device)
    for s, rows in _rows_of(bits):
        stored, by_slot, step = ordered[rows], sums[rows], scale[rows][:, None]
        closed = _merged(stored, s, 2**s) - _merged(stored, s - 1, 2**s)
        out[rows, s - 1] = (_folded(by_slot, s) * closed * step).sum(1)
        if s < max_bits:
            opened = _merged(stored, s + 1, 2 ** (s + 1)) - _merged(stored, s, 2 ** (s + 1))
            out[rows, s] = (_folded(by_slot, s + 1) * opened * step).sum(1)
    return out
