"""Effective levels: stored levels, averaged over runs by the open gates (Eqn 3's q^T U / Z_U).

Also their gradients: Eqn (8)'s share for each stored level, and finite differences for the gates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddqcli.quant.device_constants import device_constant
from ddqcli.quant.grid import GRID_STEPS


def effective_levels(levels: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
    """Return the levels in force of each group: R(q^T U / Z_U) of Eqn (3) and Eqn (4).

    The stored levels are sorted, averaged over runs of Z_U = 2^(b - s) and rounded to the grid.

    Args:
        levels: [G, 2^b] grid positions in steps, in any order.
        bits: s of each group, 1 <= s <= b.

    Returns:
        [2^s] ascending whole numbers in 0..255 for each group, float32, without gradients.

    >>> levels = torch.tensor([[0.0, 10.0, 40.0, 60.0]])
    >>> effective_levels(levels, (2,))
    [tensor([ 0., 10., 40., 60.])]
    >>> effective_levels(levels, (1,))
    [tensor([ 5., 50.])]

    The gradient of a mean goes to its run in equal shares:

    >>> one, zero, gates = torch.ones(1), torch.zeros(1), torch.ones(1, 2)
    >>> values, _, _ = EffectiveLevels.apply(levels.requires_grad_(), one, zero, gates, (1,))
    >>> values[0, 1].backward()
    >>> levels.grad
    tensor([[0.0000, 0.0000, 0.5000, 0.5000]])
    """
    ordered = levels.detach().float().sort(dim=1).values
    return [_run_means(row[None], s, 2**s)[0] for row, s in zip(ordered, bits, strict=True)]


class EffectiveLevels(torch.autograd.Function):
    """(levels, scale, zero_point, gates) -> values of the levels in force, [G, n].

    The values are returned twice, because levels and gates get different gradients of x_q: the
    first output is differentiable in levels (Eqn 8's 1 / Z_U) and scale, the second in the gates.
    The third are the grid positions. n is 2^s, or 2^(s + 1) with learned gates, so that each
    level's two finer levels stay separate: each position is repeated to fill n.
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
        finest = max(min(s + gates.requires_grad, max_bits) for s in bits)
        grid_position = ordered.new_empty(len(ordered), 2**finest)
        for s, rows in _rows_by_bits(bits, ordered.device):
            grid_position[rows] = _run_means(ordered[rows], s, 2**finest)
        steps = grid_position - zero_point[:, None]
        ctx.save_for_backward(ordered, order, scale, steps)
        ctx.bits = bits
        values, values_for_gates = steps * scale[:, None], steps * scale[:, None]
        ctx.mark_non_differentiable(
            grid_position, *(() if gates.requires_grad else (values_for_gates,))
        )
        return values, values_for_gates, grid_position

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad, grad_for_gates, _), bits = grads, ctx.bits
        ordered, order, scale, steps = ctx.saved_tensors
        needs_levels, needs_scale, _, needs_gates = ctx.needs_input_grad[:4]
        return (
            _levels_grad(grad, ordered, order, scale, bits) if needs_levels else None,
            (grad * steps).sum(1) if needs_scale else None,
            None,
            _gates_grad(grad_for_gates, ordered, scale, bits) if needs_gates else None,
            None,
        )


def spread_levels(fitted: np.ndarray, n: int) -> np.ndarray:
    """Return n ascending levels whose run means are `fitted`.

    Each run is spread evenly and symmetrically within the cell of its level, so that a gate that
    opens later finds levels between the fitted ones.
    """
    run = n // len(fitted)
    edges = np.concatenate(
        [[min(0.0, fitted[0])], (fitted[1:] + fitted[:-1]) / 2, [max(GRID_STEPS, fitted[-1])]]
    )
    reach = np.minimum(fitted - edges[:-1], edges[1:] - fitted)
    offsets = (np.arange(run) + 0.5) / run * 2 - 1
    spread: np.ndarray = fitted[:, None] + reach[:, None] * offsets
    return spread.reshape(-1)


def _run_means(ordered: Tensor, s: int, n: int) -> Tensor:
    """Levels at s bits of sorted levels [G, 2^b], each repeated to fill [G, n]."""
    # In float64: a float32 mean can round to a tie that is none.
    mean = ordered.view(len(ordered), 2**s, -1).mean(2, dtype=torch.float64)
    level = mean.round_().clamp_(0, GRID_STEPS).add_(0.0).float()  # + 0 turns -0 into 0
    return level if n == 2**s else level.repeat_interleave(n >> s, dim=1)


def _rows_by_bits(bits: tuple[int, ...], device: torch.device) -> list[tuple[int, slice | Tensor]]:
    """Each bit-width in force with the groups that have it."""
    if len(set(bits)) == 1:
        return [(bits[0], slice(None))]
    groups = {s: tuple(g for g, at in enumerate(bits) if at == s) for s in sorted(set(bits))}
    return [(s, device_constant(rows, device, torch.int64)) for s, rows in groups.items()]


def _run_sums(grad: Tensor, s: int) -> Tensor:
    """Sums over the repeats of each level: [G, n] -> [G, 2^s]."""
    return grad if grad.shape[1] == 2**s else grad.view(len(grad), 2**s, -1).sum(2)


def _levels_grad(
    grad: Tensor, ordered: Tensor, order: Tensor, scale: Tensor, bits: tuple[int, ...]
) -> Tensor:
    """Eqn (8)'s 1 / Z_U: the 2^(b - s) stored levels of a run share its gradient evenly."""
    shared = torch.empty_like(ordered)
    n = ordered.shape[1]
    for s, rows in _rows_by_bits(bits, ordered.device):
        shared[rows] = (_run_sums(grad[rows], s) * (2**s / n)).repeat_interleave(n >> s, dim=1)
    return torch.empty_like(ordered).scatter_(1, order, shared * scale[:, None])


def _gates_grad(grad: Tensor, ordered: Tensor, scale: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Finite differences of x_q when gate s closes (index s - 1) or gate s + 1 opens (index s)."""
    max_bits = (ordered.shape[1] - 1).bit_length()
    out = ordered.new_zeros(len(bits), max_bits)
    for s, rows in _rows_by_bits(bits, ordered.device):
        stored, row_grad, step = ordered[rows], grad[rows], scale[rows][:, None]
        change = _run_means(stored, s, 2**s) - _run_means(stored, s - 1, 2**s)
        out[rows, s - 1] = (_run_sums(row_grad, s) * change * step).sum(1)
        if s < max_bits:
            n = 2 ** (s + 1)
            change = _run_means(stored, s + 1, n) - _run_means(stored, s, n)
            out[rows, s] = (_run_sums(row_grad, s + 1) * change * step).sum(1)
    return out
