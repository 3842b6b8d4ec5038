"""Levels in force: stored levels, sorted and averaged over runs by the open gates (Eqn 3's U / Z_U)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddqcli.quant.grid import GRID_STEPS


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
    mean = ordered.view(len(ordered), n, -1).mean(
        2, dtype=torch.float64
    )  # float32 can round to a tie that is none
    level = mean.round_().clamp_(0, GRID_STEPS).add_(0.0).float()  # and not -0
    return level if slots == n else level.repeat_interleave(slots // n, dim=1)


class LevelsInForce(torch.autograd.Function):
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
        finest = max(
            min(s + gates.requires_grad, max_bits) for s in bits
        )  # the gates' gradient asks for children
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


def _folded(sums: Tensor, s: int) -> Tensor:
    """Sums by slot as sums by level: [G, n] -> [G, 2^s]."""
    return sums if sums.shape[1] == 2**s else sums.view(len(sums), 2**s, -1).sum(2)


def _rows_of(bits: tuple[int, ...]) -> list[tuple[int, slice | list[int]]]:
    """Each bit-width s in force with the groups that have it."""
    if len(set(bits)) == 1:
        return [(bits[0], slice(None))]
    return [(s, [g for g, at in enumerate(bits) if at == s]) for s in sorted(set(bits))]


def _levels_grad(
    sums: Tensor, ordered: Tensor, order: Tensor, scale: Tensor, bits: tuple[int, ...]
) -> Tensor:
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


def spread_levels(fitted: np.ndarray, n: int) -> np.ndarray:
    """n ascending levels whose run means are `fitted`: each run spread evenly within its level's cell."""
    run = n // len(fitted)
    edges = np.concatenate(
        [[min(0.0, fitted[0])], (fitted[1:] + fitted[:-1]) / 2, [max(GRID_STEPS, fitted[-1])]]
    )
    reach = np.minimum(fitted - edges[:-1], edges[1:] - fitted)
    offsets = (np.arange(run) + 0.5) / run * 2 - 1
    spread: np.ndarray = fitted[:, None] + reach[:, None] * offsets
    return spread.reshape(-1)
