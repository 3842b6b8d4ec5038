"""Kernels of `fake_quantize`: element-wise work on rows, eager or fused by torch.compile.

There are two ways to the nearest level, with the same results bit for bit. `_lookup_*` reads a
table with one entry per half-step of the grid, for any number of levels and groups. `_threshold_*`
compares with each threshold, which beats the table up to `FEW_LEVELS` levels, but only when fused.
The functions without an underscore are the interface: kernels for another device go behind it.
`activation.py`'s own kernels (uniform levels, above 4 bits) and `compiled.py` belong to the same
interface: another kind of device needs its own version of them too.

They take one tensor of G groups or G tensors of one group each, and `values` [G, n]. The kernels
themselves take rows: [G, M], or for several tensors one row [1, N] (`Rows`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddqcli.quant.compiled import maybe_compiled
from ddqcli.quant.grid import grid_cells
from ddqcli.quant.layout import Rows
from ddqcli.quant.lookup import CellTables

FEW_LEVELS = 16  # up to here, a fused comparison with each level is faster than a table


@dataclass(frozen=True)
class Constants:
    """Arguments of the kernels that autograd does not see.

    Attributes:
        cells: the nearest level for each cell of the grid.
        correction: [G] lambda of Eqn (9); None without it.
        axis: axis along which the groups of a single tensor lie.
        use_compiled: fuse with torch.compile.
    """

    cells: CellTables
    correction: Tensor | None
    axis: int
    use_compiled: bool


class Gradients(NamedTuple):
    """Results of a backward pass over all values, for n levels.

    Attributes:
        xs: gradient of each tensor.
        by_gap: [G, n + 1] sums for the levels' gradient: below, between and above the levels.
        correction_by_level: [G, n] sums of Eqn (9)'s lambda * (x_q - x), if there is a lambda.
        grad_by_level: [G, n] sums of the incoming gradient, if the gates are learned.
    """

    xs: tuple[Tensor, ...]
    by_gap: Tensor
    correction_by_level: Tensor | None = None
    grad_by_level: Tensor | None = None


def suits_thresholds(values: Tensor, use_compiled: bool) -> bool:
    """True if comparing with each threshold is the faster way to the nearest of `values`."""
    return use_compiled and len(values) == 1 and values.shape[1] <= FEW_LEVELS


def quantize(values: Tensor, constants: Constants, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Eqn (3): the nearest of `values` for each x; NaN where x is not finite."""
    rows = Rows(xs, constants.axis, len(values))
    x, cells, use_compiled = rows.join(xs), constants.cells, constants.use_compiled
    if suits_thresholds(values, use_compiled):
        return rows.split(maybe_compiled(_threshold_quantize, x.device, True)(x, values))
    kernel = maybe_compiled(_lookup_quantize, x.device, use_compiled)
    return rows.split(kernel(x, cells.nearest_value, *rows.spread(*cells.addressing())))


def straight_through(
    values: Tensor, constants: Constants, grads: Sequence[Tensor | None], xs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Sec. 3.2: the gradient of x_q where x lies between the outer levels, 0 elsewhere."""
    rows = Rows(xs, constants.axis, len(values))
    ends = rows.spread(values[:, :1], values[:, -1:])
    kernel = maybe_compiled(_straight_through, values.device, constants.use_compiled)
    return rows.split(kernel(rows.join(grads), rows.join(xs), *ends))


def threshold_gradients(
    values: Tensor, constants: Constants, grads: Sequence[Tensor | None], xs: Sequence[Tensor]
) -> Gradients:
    """Gradients of one tensor with few levels, compiled."""
    rows = Rows(xs, constants.axis, 1)
    kernel = maybe_compiled(_threshold_gradients, values.device, True)
    grad_x, *sums = kernel(rows.join(grads), rows.join(xs), values, constants.correction)
    return Gradients(rows.split(grad_x), *sums)


def lookup_gradients(
    values: Tensor,
    constants: Constants,
    grads: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    learned_gates: bool,
) -> Gradients:
    """Gradients for any number of levels, groups and tensors."""
    groups, n = values.shape
    cells, correction, bins = constants.cells, constants.correction, groups * 2 * n
    rows = Rows(xs, constants.axis, groups)
    grad = rows.join(grads)
    kernel = maybe_compiled(_lookup_gradients, values.device, constants.use_compiled)
    bin_, grad_x, *to_sum = kernel(
        torch.uint8 if bins <= 256 else torch.int32,
        grad,
        rows.join(xs),
        *rows.spread(values[:, :1], values[:, -1:], *cells.addressing()),
        cells.nearest_value,
        cells.bin + 2 * n * cells.group_index(),
        None if correction is None else rows.spread(correction[:, None])[0],
    )
    if learned_gates:
        to_sum.append(grad.float())
    by_bin = [sums.view(groups, 2 * n) for sums in _sums_by_bin(to_sum, bin_, bins)]
    below, between, above = by_bin[0].tensor_split([1, 2 * n - 1], 1)
    by_level = [sums.view(groups, n, 2).sum(2) for sums in by_bin[1:]]
    return Gradients(
        rows.split(grad_x),
        torch.cat([below, between.reshape(groups, -1, 2).sum(2), above], 1),
        None if correction is None else by_level[0],
        by_level[-1] if learned_gates else None,
    )


def _lookup_quantize(
    x: Tensor, nearest_value: Tensor, half_step: Tensor, zero_cell: Tensor, first_cell: Tensor
) -> Tensor:
    cell = _table_index(x, half_step, zero_cell, first_cell)
    nearest = nearest_value.view(-1).index_select(0, cell).view(x.shape)
    return torch.add(nearest, x, alpha=-0.0).to(x.dtype)  # NaN where x is not finite


def _threshold_quantize(x: Tensor, values: Tensor) -> Tensor:
    nearest = _highest_reached(_thresholds_reached(x, values), values)
    return torch.add(nearest, x, alpha=-0.0).to(x.dtype)  # NaN where x is not finite


def _straight_through(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where((x >= low) & (x <= high), grad, 0.0)


def _lookup_gradients(
    bin_dtype: torch.dtype,
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    half_step: Tensor,
    zero_cell: Tensor,
    first_cell: Tensor,
    nearest_value: Tensor,
    bin_: Tensor,
    correction: Tensor | None,
) -> tuple[Tensor, ...]:
    """Bin, gradient of x, and what to sum by bin: for the levels and, with a lambda, for Eqn (9).

    All are computed from x again, so that x alone is saved for the backward pass.
    """
    cell = _table_index(x, half_step, zero_cell, first_cell)
    residual = nearest_value.view(-1).index_select(0, cell).view(x.shape) - x
    results = (
        bin_.view(-1).index_select(0, cell).view(x.shape).to(bin_dtype),
        *_x_and_level_terms(grad, x, residual, low, high),
    )
    return results if correction is None else (*results, correction * residual)


def _threshold_gradients(
    grad: Tensor, x: Tensor, values: Tensor, correction: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradient of x [1, M], sums [1, n + 1] by gap and, with a lambda, sums [1, n] by level."""
    reached = _thresholds_reached(x, values)
    residual = _highest_reached(reached, values) - x
    grad_x, level_terms = _x_and_level_terms(grad, x, residual, values[:, :1], values[:, -1:])
    by_gap = _masked_sums(level_terms, [x >= value for value in values.unbind(1)])
    if correction is None:
        return grad_x, by_gap
    return grad_x, by_gap, _masked_sums(correction * residual, reached)


def _x_and_level_terms(
    grad: Tensor, x: Tensor, residual: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and each value's term in the levels' gradient (see `fake_quantize.py`).

    The term is grad * (x - x_q) between the outer levels and grad beyond. `residual` is x_q - x.
    """
    inside = (x >= low) & (x <= high)
    return torch.where(inside, grad, 0.0), torch.where(inside, -residual, 1.0) * grad.float()


def _table_index(x: Tensor, half_step: Tensor, zero_cell: Tensor, first_cell: Tensor) -> Tensor:
    """Index of each value's cell in the flattened tables of all groups."""
    return (grid_cells(x, half_step, zero_cell) + first_cell).view(-1)


def _thresholds_reached(x: Tensor, values: Tensor) -> list[Tensor]:
    """x >= t for each of the n - 1 midpoints t of n values, which are exact in float32."""
    return [x >= threshold for threshold in ((values[:, 1:] + values[:, :-1]) / 2).unbind(1)]


def _highest_reached(reached: list[Tensor], values: Tensor) -> Tensor:
    nearest = values[:, :1].expand_as(reached[0])
    for k, at_or_above in enumerate(reached, 1):
        nearest = torch.where(at_or_above, values[:, k], nearest)
    return nearest


def _masked_sums(terms: Tensor, above: list[Tensor]) -> Tensor:
    """Sums [1, k + 1] of terms [1, M] below, between and above k bounds, given x >= bound."""
    members = [~above[0], *(a & ~b for a, b in itertools.pairwise(above)), above[-1]]
    return torch.stack([torch.where(member, terms, 0.0).sum(1) for member in members], 1)


def _sums_by_bin(parts: Sequence[Tensor], bin_: Tensor, bins: int) -> list[Tensor]:
    """For each part its sums by bin, [bins] float32."""
    index = bin_.reshape(-1)
    if index.is_cpu:
        return [
            torch.bincount(index, weights=part.reshape(-1), minlength=bins).float()
            for part in parts
        ]
    index = index.long()
    return [
        torch.zeros(bins, device=index.device).scatter_add_(0, index, part.reshape(-1))
        for part in parts
    ]
