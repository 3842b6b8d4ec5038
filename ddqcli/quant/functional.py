"""DDQ's quantization function (Eqn 3) and its gradients (Eqn 8, Eqn 9, the gates' finite differences).

A level is a point of a grid: `value = (k - zero_point) * scale` with k in 0..255 (b_q = 8). `scale` has at most 12
significant bits, so every level and every midpoint of two levels is exact in float32. A value's half-step,
`floor(x / (scale / 2))`, then decides its nearest level exactly, and one small table replaces the search:
no U, no Kronecker product, no one-hot vector and no N x 2^b tensor is ever made.

No level stands for NaN or an infinity: one such value makes the whole output NaN, as after a float layer, so that the loss
shows it without the device being asked at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    if len(set(bits)) == 1:
        return list(_merged(ordered, bits[0]))
    return [_merged(row[None], s)[0] for row, s in zip(ordered, bits, strict=True)]


def _merged(ordered: Tensor, s: int) -> Tensor:
    mean = ordered.view(len(ordered), 2**s, -1).mean(2, dtype=torch.float64)  # float32 can round to a tie that is none
    return mean.round_().clamp_(0, STEPS).float()


def nearest_table(level: Tensor, *, halves: bool) -> Tensor:
    """Index of the nearest level for each of the 512 cells of `half_steps`; a tie goes to the upper level.

    With `halves`, the index is 2k or 2k + 1: below or from level k on, which says the child that an opened gate would take.

    Args:
        level: [n] ascending whole numbers in 0..255.

    Returns:
        uint8 [512].
    """
    middle = level[1:] + level[:-1]
    if halves:
        edges = torch.empty(2 * len(level) - 1, device=level.device)
        edges[0::2], edges[1::2] = 2 * level, middle
    else:
        edges = middle
    cells = torch.arange(-1, CELLS - 1, device=level.device, dtype=edges.dtype)
    return torch.bucketize(cells, edges.contiguous(), right=True).to(torch.uint8)


def half_steps(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The cell of each value: 0 below the grid, else 1 + its half-step on the grid, at most 511. int32, shape of x.

    Division, not multiplication by a reciprocal: m * scale / 2 is exact in float32 for the whole numbers m in question, and
    correctly rounded division never carries x across such a point. Only a quotient that underflows, |x| below 2^-150 of a
    half-step, counts as 0.
    """
    cell = torch.div(x.float(), scale / 2).floor_().add_(2 * zero_point + 1)
    return cell.clamp_(0, CELLS - 1).to(torch.int32)


def poison(x: Tensor) -> Tensor:
    """0, or NaN if any value of x is NaN or infinite; a scalar on x's device."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x.detach())
    return (low * 0 + high * 0).float()


class _FakeQuantize(torch.autograd.Function):
    """x -> A_s[k]; gradients to x (straight through), levels (Eqn 8), scale and gates; Eqn (9) on the latter three."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        levels: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        gates: Tensor,
        bits: tuple[int, ...],
        axis: int,
        correction: float,
    ) -> Tensor:
        bad = poison(x)
        grouped = _by_group(x, axis, len(bits))
        if x.is_cpu and bool(bad.isnan()):
            grouped = grouped.nan_to_num()  # an index made of NaN may lie anywhere on a CPU
        max_bits = (levels.shape[1] - 1).bit_length()
        halves = [s < max_bits for s in bits]
        effective = effective_levels(levels, bits)
        tables = [nearest_table(level, halves=h) for level, h in zip(effective, halves, strict=True)]
        values = [(level - z) * c + bad for level, z, c in zip(effective, zero_point, scale, strict=True)]
        if len(bits) == 1:
            cell = half_steps(grouped, scale, zero_point).view(-1)
            table = tables[0]
            value = values[0].index_select(0, (table >> halves[0]).int())
        else:
            cell = half_steps(grouped, scale[:, None], zero_point[:, None])
            cell += torch.arange(len(bits), device=x.device, dtype=torch.int32)[:, None] * CELLS
            cell, table = cell.reshape(-1), torch.cat(tables)
            value = torch.cat(
                [v.index_select(0, (t >> h).int()) for v, t, h in zip(values, tables, halves, strict=True)]
            )
        quantized = value.index_select(0, cell)
        codes = table.index_select(0, cell)
        ctx.save_for_backward(x, codes, quantized, levels, scale, zero_point)
        ctx.constants = (bits, axis, correction, halves, effective, values)
        return _ungroup(quantized, x, axis, len(bits)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, codes, quantized, levels, scale, zero_point = ctx.saved_tensors
        bits, axis, correction, halves, effective, values = ctx.constants
        groups = len(bits)
        grad_x = grad_levels = grad_scale = grad_gates = None
        if ctx.needs_input_grad[0]:
            low, high = (_along(torch.stack([v[i] for v in values]), x, axis) for i in (0, -1))
            grad_x = grad * ((x >= low) & (x <= high))
        if any(ctx.needs_input_grad[1:5]):
            flat = _by_group(grad, axis, groups).reshape(-1).float()
            if correction:
                flat = torch.add(flat, quantized - _by_group(x, axis, groups).reshape(-1), alpha=correction)
            sums = _sums(flat, codes, groups)
            if ctx.needs_input_grad[1]:
                grad_levels = _levels_grad(sums, levels, scale, bits, halves)
            if ctx.needs_input_grad[2]:
                per_level = [_fold(row, s, h) for row, s, h in zip(sums, bits, halves, strict=True)]
                grad_scale = torch.stack(
                    [(p * (level - z)).sum() for p, level, z in zip(per_level, effective, zero_point, strict=True)]
                )
            if ctx.needs_input_grad[4]:
                grad_gates = _gates_grad(sums, levels, scale, zero_point, bits, halves, values)
        return grad_x, grad_levels, grad_scale, None, grad_gates, None, None, None


def fake_quantize(
    x: Tensor,
    levels: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    gates: Tensor,
    bits: tuple[int, ...],
    *,
    axis: int = 0,
    correction: float = 0.0,
) -> Tensor:
    """Eqn (3): each value replaced by the nearest level in force, bit for bit a member of the level set.

    Args:
        x: values, any shape.
        levels: [G, 2^b] level positions on the grid, in steps (0..255); G is 1 or x.shape[axis].
        scale: [G] step size, as `representable` gives it.
        zero_point: [G] whole number in 0..255, the grid point of the value 0.
        gates: [G, b] gate logits; only their gradient is used here, `bits` says how many are open.
        bits: s for each group.
        axis: the axis of x that the groups follow.
        correction: lambda of Eqn (9), in units of the loss per squared unit of x.

    Gradients: to x where A_0 <= x <= A_last; to levels the sum over a level's members divided by its run length;
    to the gates s and s + 1 the finite differences A_s - A_(s-1) and A_(s+1) - A_s, none to the others.

    >>> levels, one = torch.tensor([[0.0, 10.0, 20.0, 30.0]]), torch.ones(1)
    >>> fake_quantize(torch.tensor([4.9, 5.0, 99.0]), levels, one, 0 * one, torch.ones(1, 2), (2,))
    tensor([ 0., 10., 30.])
    >>> fake_quantize(torch.tensor([4.9, 5.0, 99.0]), levels, one, 0 * one, torch.ones(1, 2), (1,))
    tensor([ 5.,  5., 25.])
    """
    quantized: Tensor = _FakeQuantize.apply(x, levels, scale, zero_point, gates, bits, axis, correction)  # type: ignore[no-untyped-call]
    return quantized


def _by_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], the groups along `axis`."""
    return x.reshape(1, -1) if groups == 1 else x.movedim(axis, 0).reshape(groups, -1)


def _ungroup(flat: Tensor, like: Tensor, axis: int, groups: int) -> Tensor:
    if groups == 1:
        return flat.view(like.shape)
    moved = like.movedim(axis, 0).shape
    return flat.view(moved).movedim(0, axis)


def _along(per_group: Tensor, like: Tensor, axis: int) -> Tensor:
    """[G] broadcast against `like` along `axis`."""
    if len(per_group) == 1:
        return per_group
    shape = [1] * like.ndim
    shape[axis] = -1
    return per_group.view(shape)


def _sums(flat: Tensor, codes: Tensor, groups: int) -> Tensor:
    """Sum of `flat` by code within each group: [groups, 256] float32."""
    index = codes.long()
    if groups > 1:
        index = (index.view(groups, -1) + 256 * torch.arange(groups, device=index.device)[:, None]).view(-1)
    return torch.zeros(groups * 256, device=flat.device).scatter_add_(0, index, flat).view(groups, 256)


def _fold(row: Tensor, s: int, halves: bool) -> Tensor:
    """[256] sums by code as [2^s] sums by level."""
    return row[: 2 ** (s + 1)].view(-1, 2).sum(1) if halves else row[: 2**s]


def _levels_grad(sums: Tensor, levels: Tensor, scale: Tensor, bits: tuple[int, ...], halves: list[bool]) -> Tensor:
    """Eqn (8): each level gets its members' sum, shared evenly by the 2^(b - s) stored levels of its run."""
    n = levels.shape[1]
    order = levels.detach().argsort(dim=1, stable=True)
    runs = [
        _fold(row, s, h).mul(2**s / n).repeat_interleave(n // 2**s)
        for row, s, h in zip(sums, bits, halves, strict=True)
    ]
    return torch.zeros_like(levels).scatter_(1, order, torch.stack(runs) * scale[:, None])


def _gates_grad(
    sums: Tensor,
    levels: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: tuple[int, ...],
    halves: list[bool],
    values: list[Tensor],
) -> Tensor:
    """Finite differences at the boundary gates: closing gate s (index s - 1), opening gate s + 1 (index s)."""
    max_bits = (levels.shape[1] - 1).bit_length()
    out = torch.zeros(len(bits), max_bits, device=levels.device)
    for g, (s, h) in enumerate(zip(bits, halves, strict=True)):

        def level_values(at: int, g: int = g) -> Tensor:
            return (effective_levels(levels[g : g + 1], (at,))[0] - zero_point[g]) * scale[g]

        parent = level_values(s - 1).repeat_interleave(2)
        out[g, s - 1] = (_fold(sums[g], s, h) * (values[g] - parent)).sum()
        if s < max_bits:
            opened = level_values(s + 1) - values[g].repeat_interleave(2)
            out[g, s] = (sums[g, : 2 ** (s + 1)] * opened).sum()
    return out
