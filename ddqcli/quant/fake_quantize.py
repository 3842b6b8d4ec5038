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
from typing import Any

import torch
from torch import Tensor

from ddqcli.quant.compiled import compiled
from ddqcli.quant.grid import GRID_CELLS, grid_cells
from ddqcli.quant.layout import from_rows, match_layout, to_rows
from ddqcli.quant.lookup import LookupTables


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
    return (grid_cells(x, half, offset) + base).view(-1)


def _inside(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """grad where low <= x <= high, 0 elsewhere."""
    return torch.where((x >= low) & (x <= high), grad, 0.0)


def _straight(
    grad: Tensor, x: Tensor, residual: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
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
    found = (
        bins.view(-1).index_select(0, cell).view(x.shape).to(kind),
        *_straight(grad, x, residual, low, high),
    )
    return found if correction is None else (*found, correction * residual)


def _parts_of_few(
    grad: Tensor, x: Tensor, values: Tensor, correction: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradient of x [1, M], the sums [1, n + 1] by gap of n values and, with a correction, [1, n] by level: to be fused."""
    reached = _reached(x, values)
    residual = _highest(reached, values) - x
    grad_x, to_gap = _straight(grad, x, residual, values[:, :1], values[:, -1:])
    by_gap = _masked_sums(to_gap, [x >= value for value in values.unbind(1)])
    return (
        (grad_x, by_gap)
        if correction is None
        else (grad_x, by_gap, _masked_sums(correction * residual, reached))
    )


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
        use_compiled: bool,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, by_cell, bins, half, offset, correction, *xs)
        ctx.constants = (axis, learns, corrects, use_compiled)
        ctx.set_materialize_grads(False)
        kind, row = half.device.type, _row(xs, xs, axis, len(values))
        if use_compiled and len(values) == 1 and values.shape[1] <= _FEW:
            return _parted(compiled(_snap_to_few, kind)(row, values), xs, axis)
        base = (
            GRID_CELLS * torch.arange(len(values), device=half.device, dtype=torch.int32)[:, None]
        )
        snap = compiled(_snap, kind) if use_compiled else _snap
        return _parted(snap(row, by_cell, *_spread([half, offset, base], xs)), xs, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, by_cell, bins, half, offset, correction, *xs = ctx.saved_tensors
        axis, learns, corrects, use_compiled = ctx.constants
        kind, (groups, count) = half.device.type, values.shape
        known = [
            torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, xs, strict=True)
        ]
        pair = _row(known, xs, axis, groups), _row(xs, xs, axis, groups)
        wanted, gated = ctx.needs_input_grad[:2]
        of_values = of_gates = None
        if not (wanted and learns):
            ends = _spread([values[:, :1], values[:, -1:]], xs)
            grad_x = (compiled(_inside, kind) if use_compiled else _inside)(*pair, *ends)
            of_values = torch.zeros_like(values) if wanted else None
        elif use_compiled and groups == 1 and count <= _FEW and not gated:
            grad_x, by_gap, *by_code = compiled(_parts_of_few, kind)(
                *pair, values, correction if corrects else None
            )
            of_values = _by_level(by_gap, values) + sum(by_code)
        else:
            group = torch.arange(groups, device=half.device, dtype=torch.int32)[:, None]
            spread = [
                values[:, :1],
                values[:, -1:],
                half,
                offset,
                GRID_CELLS * group,
                correction[:, None],
            ]
            *where, factor = _spread(spread, xs)
            small = torch.uint8 if groups * 2 * count <= 256 else torch.int32
            kernel: Callable[..., Any] = compiled(_parts, kind) if use_compiled else _parts
            found = kernel(
                small,
                *pair,
                *where,
                by_cell,
                bins + 2 * count * group,
                factor if corrects else None,
            )
            bin_, grad_x, *to_sum = found
            to_sum += [pair[0].float()] if gated else []
            by_gap, *by_code = (s.view(groups, -1) for s in _sums(to_sum, bin_, groups * 2 * count))
            by_code = [s.view(groups, count, 2).sum(2) for s in by_code]
            of_values = _by_level(_gap_sums(by_gap), values) + (by_code[0] if corrects else 0)
            of_gates = sum(by_code) if gated else None
        of_xs = zip(grads, _parted(grad_x, xs, axis), strict=True)
        return (
            of_values,
            of_gates,
            *(None,) * 9,
            *(None if grad is None else of_x for grad, of_x in of_xs),
        )


def fake_quantize(
    x: Tensor,
    tables: LookupTables,
    *,
    axis: int = 0,
    correction: float = 0.0,
    use_compiled: bool = False,
) -> Tensor:
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
    return _apply([x], tables, [correction], axis, use_compiled and x.numel() >= MANY)[0]


def fake_quantize_many(
    xs: list[Tensor], tables: LookupTables, corrections: list[float]
) -> tuple[Tensor, ...]:
    """`fake_quantize` of several small tensors, one group each, for little more than the price of one.

    Args:
        xs: G tensors of any shapes.
        tables: of G groups.
        corrections: G of `fake_quantize`'s.
    """
    return _apply(xs, tables, corrections, 0, False)


def _apply(
    xs: list[Tensor], tables: LookupTables, corrections: list[float], axis: int, use_compiled: bool
) -> tuple[Tensor, ...]:
    t = tables
    of_one = len(corrections) == 1  # is filled in by the device itself, without waiting for it
    factors = t.half.new_full((1,), corrections[0]) if of_one else t.half.new_tensor(corrections)
    out: tuple[Tensor, ...] = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        t.values, t.values_for_gates, t.by_cell, t.bins, t.half, t.offset, factors, axis, t.learns, any(corrections), use_compiled, *xs
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
        return to_rows(match_layout(tensors[0], like[0]), axis, groups)
    return torch.cat(
        [to_rows(match_layout(x, pattern), 0, 1) for x, pattern in zip(tensors, like, strict=True)],
        1,
    )


def _parted(row: Tensor, xs: Sequence[Tensor], axis: int) -> tuple[Tensor, ...]:
    """The inverse of `_row`."""
    if len(xs) == 1:
        return (from_rows(row, xs[0], axis),)
    parts = row.split([x.numel() for x in xs], 1)  # type: ignore[no-untyped-call]
    return tuple(from_rows(part.clone(), x, 0) for part, x in zip(parts, xs, strict=True))


def _sums(parts: Sequence[Tensor], code: Tensor, count: int) -> list[Tensor]:
    """For each part [count] float32: its sums by code."""
    index = code.reshape(-1)
    if code.is_cpu:
        return [
            torch.bincount(index, weights=part.reshape(-1), minlength=count).float()
            for part in parts
        ]
    index = index.long()
    return [
        torch.zeros(count, device=code.device).scatter_add_(0, index, part.reshape(-1))
        for part in parts
    ]
