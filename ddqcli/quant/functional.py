"""DDQ's quantization function (Eqn 3) and its gradients (Eqn 8, Eqn 9, the gates' finite differences).

A level is a point of a grid: `value = (k - zero_point) * scale` with k in 0..255 (b_q = 8). `scale` has at most 12
significant bits, so every level and every midpoint of two levels is exact in float32. A value's half-step,
`floor(x / (scale / 2))`, then decides its nearest level exactly, and one small table replaces the search:
no U, no Kronecker product, no one-hot vector and no N x 2^b tensor is ever made.

No level stands for NaN or an infinity: one such value makes the whole output NaN, as after a float layer, so that the loss
shows it without the device being asked at every step.
"""

from __future__ import annotations

from functools import lru_cache
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
    return _in_force(levels.detach().float().sort(dim=1).values, bits)


def _in_force(ordered: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
    """`effective_levels` of levels that are sorted already."""
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
    edges = level[1:] + level[:-1]
    if halves:
        edges = torch.stack([2 * level, torch.cat([edges, edges[-1:]])], dim=1).view(-1)[:-1]
    return torch.bucketize(_cells(level.device), edges, right=True).to(torch.uint8)


@lru_cache(maxsize=8)
def _cells(device: torch.device) -> Tensor:
    """Each cell of `half_steps` as its lower end, in half-steps."""
    return torch.arange(-1.0, CELLS - 1, device=device)


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
        finite = (
            x.nan_to_num() if x.is_cpu and bool(bad.isnan()) else x
        )  # an index made of NaN may lie anywhere on a CPU
        ordered, order = levels.detach().float().sort(dim=1, stable=True)
        max_bits = (levels.shape[1] - 1).bit_length()
        halves = [gates.requires_grad and s < max_bits for s in bits]  # only the gates' gradient asks for children
        effective = _in_force(ordered, bits)
        tables = [nearest_table(level, halves=h) for level, h in zip(effective, halves, strict=True)]
        values = [(level - z) * c + bad for level, z, c in zip(effective, zero_point, scale, strict=True)]
        looked_up = [
            v.index_select(0, (t >> 1 if h else t).int()) for v, t, h in zip(values, tables, halves, strict=True)
        ]
        cell = half_steps(finite, along(scale, x, axis), along(zero_point, x, axis))
        if len(bits) > 1:
            cell += along(torch.arange(len(bits), device=x.device, dtype=torch.int32) * CELLS, x, axis)
        flat = _flat(cell)
        codes = _joined(tables).index_select(0, flat)
        quantized = _joined(looked_up).index_select(0, flat).as_strided(cell.shape, cell.stride())
        ctx.save_for_backward(x, codes, quantized, ordered, order, scale, zero_point)
        ctx.constants = (bits, axis, correction, halves, effective, values)
        return quantized.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, codes, quantized, ordered, order, scale, zero_point = ctx.saved_tensors
        bits, axis, correction, halves, effective, values = ctx.constants
        grad_x = grad_levels = grad_scale = grad_gates = None
        if ctx.needs_input_grad[0]:
            grad_x = _straight_through(grad, x, values, axis)
        if any(ctx.needs_input_grad[1:5]):
            grad = grad.float()
            if correction:
                grad = torch.add(grad, quantized - x, alpha=correction)
            sums = _sums(_like(grad, quantized), codes, len(bits), axis)
            if ctx.needs_input_grad[1]:
                grad_levels = _levels_grad(sums, ordered, order, scale, bits, halves)
            if ctx.needs_input_grad[2]:
                per_level = [_fold(row, s, h) for row, s, h in zip(sums, bits, halves, strict=True)]
                grad_scale = torch.stack(
                    [(p * (level - z)).sum() for p, level, z in zip(per_level, effective, zero_point, strict=True)]
                )
            if ctx.needs_input_grad[4]:
                grad_gates = _gates_grad(sums, ordered, scale, zero_point, bits, halves, values)
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

    All of the output is NaN if any value of x is NaN or infinite.

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


def by_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], the groups along `axis`."""
    return x.reshape(1, -1) if groups == 1 else x.movedim(axis, 0).reshape(groups, -1)


def _flat(dense: Tensor) -> Tensor:
    """A dense tensor as one row in the order of its memory, whatever its memory format."""
    return dense.as_strided((dense.numel(),), (1,))


def _like(x: Tensor, pattern: Tensor) -> Tensor:
    """x in the memory order of `pattern`."""
    return x if x.stride() == pattern.stride() else torch.empty_like(pattern).copy_(x)


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def along(per_group: Tensor, like: Tensor, axis: int) -> Tensor:
    """[G] broadcast against `like` along `axis`."""
    if len(per_group) == 1:
        return per_group.view(())
    shape = [1] * like.ndim
    shape[axis] = -1
    return per_group.view(shape)


def _straight_through(grad: Tensor, x: Tensor, values: list[Tensor], axis: int) -> Tensor:
    """grad where A_0 <= x <= A_last, 0 elsewhere."""
    if len(values) == 1 and x.is_cpu and x.dtype == grad.dtype == torch.float32:
        # One pass instead of four. hardtanh's mask leaves its bounds out, so it gets the floats just beyond ours.
        outer = torch.nextafter(values[0][[0, -1]], torch.tensor([-torch.inf, torch.inf])).tolist()
        return torch.ops.aten.hardtanh_backward(grad, x, *outer)  # type: ignore[no-any-return]
    low, high = (along(torch.stack([v[i] for v in values]), x, axis) for i in (0, -1))
    return grad * ((x >= low) & (x <= high))


def _sums(grad: Tensor, codes: Tensor, groups: int, axis: int) -> Tensor:
    """Sum of `grad` by code within each group: [groups, 256] float32. `codes` lie in memory as `grad` does."""
    if groups == 1 and grad.is_cpu:
        return torch.bincount(codes, weights=_flat(grad), minlength=256)[None].float()
    index = codes.long()
    if groups > 1:
        group = along(256 * torch.arange(groups, device=index.device), grad, axis)
        index = _flat(index.as_strided(grad.shape, grad.stride()) + group)
    return torch.zeros(groups * 256, device=grad.device).scatter_add_(0, index, _flat(grad)).view(groups, 256)


def _fold(row: Tensor, s: int, halves: bool) -> Tensor:
    """[256] sums by code as [2^s] sums by level."""
    return row[: 2 ** (s + 1)].view(-1, 2).sum(1) if halves else row[: 2**s]


def _levels_grad(
    sums: Tensor, ordered: Tensor, order: Tensor, scale: Tensor, bits: tuple[int, ...], halves: list[bool]
) -> Tensor:
    """Eqn (8): each level gets its members' sum, shared evenly by the 2^(b - s) stored levels of its run."""
    n = ordered.shape[1]
    each = [_fold(row, s, h).mul(2**s / n) for row, s, h in zip(sums, bits, halves, strict=True)]
    runs = [e[:, None].expand(-1, n // len(e)).reshape(1, n) for e in each]
    return torch.empty_like(ordered).scatter_(1, order, _joined(runs) * scale[:, None])


def _gates_grad(
    sums: Tensor,
    ordered: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: tuple[int, ...],
    halves: list[bool],
    values: list[Tensor],
) -> Tensor:
    """Finite differences at the boundary gates: closing gate s (index s - 1), opening gate s + 1 (index s)."""
    max_bits = (ordered.shape[1] - 1).bit_length()
    out = torch.zeros(len(bits), max_bits, device=ordered.device)
    for g, (s, h) in enumerate(zip(bits, halves, strict=True)):

        def level_values(at: int, g: int = g) -> Tensor:
            return (_in_force(ordered[g : g + 1], (at,))[0] - zero_point[g]) * scale[g]

        parent = level_values(s - 1).repeat_interleave(2)
        out[g, s - 1] = (_fold(sums[g], s, h) * (values[g] - parent)).sum()
        if s < max_bits:
            opened = level_values(s + 1) - values[g].repeat_interleave(2)
            out[g, s] = (sums[g, : 2 ** (s + 1)] * opened).sum()
    return out
