"""The interface of `fake_quantize` to its kernels: the operators `ddq::...`, or PyTorch's own.

They take one tensor of G groups or G tensors of one group each, and `values` [G, n]. Kernels for
another device go behind these functions and those of `uniform_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddqcli.quant import operators, torch_kernels
from ddqcli.quant.layout import Rows
from ddqcli.quant.lookup import CellTables


@dataclass(frozen=True)
class Constants:
    """Arguments of the kernels that autograd does not see.

    Attributes:
        cells: the nearest level for each cell of the grid.
        correction: [G] lambda of Eqn (9); None without it.
        axis: axis along which the groups of a single tensor lie.
        use_compiled: use the kernels in C if the tensors are on a CPU.
    """

    cells: CellTables
    correction: Tensor | None
    axis: int
    use_compiled: bool


class Gradients(NamedTuple):
    """Results of a backward pass over all values, for n levels.

    Attributes:
        xs: gradient of each tensor.
        values: [G, n] gradient of the levels' values.
        values_for_gates: [G, n] the same as it reaches the gates, if they are learned.
    """

    xs: tuple[Tensor, ...]
    values: Tensor
    values_for_gates: Tensor | None = None


Grads = Sequence[Tensor | None]


def quantize(values: Tensor, constants: Constants, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Eqn (3): the nearest of `values` for each x; NaN where x is not finite."""
    rows = Rows(xs, constants.axis, len(values))
    x, cells = rows.join(xs), constants.cells

    def by_torch() -> Tensor:
        return torch_kernels.quantize(x, cells.nearest_value, *rows.spread(*cells.addressing()))

    def by_operator() -> Tensor:
        tables = cells.nearest_value, cells.half_step, cells.zero_cell
        return torch.ops.ddq.quantize(x, *_places(rows), *tables)  # type: ignore[no-any-return]

    return rows.split(operators.preferred(by_operator, by_torch, constants.use_compiled, x))


def straight_through(
    values: Tensor, constants: Constants, grads: Grads, xs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Sec. 3.2: the gradient of x_q where x lies between the outer levels, 0 elsewhere."""
    rows = Rows(xs, constants.axis, len(values))
    grad, x = rows.join(grads), rows.join(xs)

    def by_torch() -> Tensor:
        return torch_kernels.straight_through(grad, x, *rows.spread(values[:, :1], values[:, -1:]))

    def by_operator() -> Tensor:
        return torch.ops.ddq.straight_through(grad, x, *_places(rows), values)  # type: ignore[no-any-return]

    return rows.split(operators.preferred(by_operator, by_torch, constants.use_compiled, grad, x))


def gradients(
    values: Tensor,
    constants: Constants,
    grads: Grads,
    xs: Sequence[Tensor],
    learned_gates: bool,
) -> Gradients:
    """Gradients of each x, of the levels and, if they are learned, of the gates."""
    rows = Rows(xs, constants.axis, len(values))
    grad, x, cells = rows.join(grads), rows.join(xs), constants.cells

    def by_torch() -> tuple[Tensor, ...]:
        return _gradients_by_torch(values, constants, grad, x, rows, learned_gates)

    def by_operator() -> tuple[Tensor, ...]:
        tables = cells.nearest_value, cells.bin, cells.half_step, cells.zero_cell
        correction = constants.correction
        if correction is not None:
            correction = correction.expand(len(values)).contiguous()
        return torch.ops.ddq.level_gradients(  # type: ignore[no-any-return]
            grad, x, *_places(rows), values, *tables, correction, learned_gates
        )

    grad_x, *of_levels = operators.preferred(by_operator, by_torch, constants.use_compiled, grad, x)
    return Gradients(rows.split(grad_x), *of_levels[: 1 + learned_gates])


def _places(rows: Rows) -> tuple[Tensor, int]:
    """Return the start of each group in the joined rows, and the values of the longest."""
    return rows.starts, max(rows.group_sizes)


def _gradients_by_torch(
    values: Tensor, constants: Constants, grad: Tensor, x: Tensor, rows: Rows, learned_gates: bool
) -> tuple[Tensor, ...]:
    """Of x, the levels and the gates, by PyTorch's own operations."""
    groups, n = values.shape
    cells, correction, bins = constants.cells, constants.correction, groups * 2 * n
    low, high = rows.spread(values[:, :1], values[:, -1:])
    half_step, zero_cell, first_cell = rows.spread(*cells.addressing())
    bin_, grad_x, *to_sum = torch_kernels.gradients(
        torch.uint8 if bins <= 256 else torch.int32,
        grad,
        x,
        low,
        high,
        half_step,
        zero_cell,
        first_cell,
        cells.nearest_value,
        cells.bin + 2 * n * cells.group_index(),
        None if correction is None else rows.spread(correction[:, None])[0],
    )
    if learned_gates:
        to_sum.append(grad.float())
    by_bin = [sums.view(groups, 2 * n) for sums in torch_kernels.sums_by_bin(to_sum, bin_, bins)]
    below, between, above = by_bin[0].tensor_split([1, 2 * n - 1], 1)
    by_gap = torch.cat([below, between.reshape(groups, -1, 2).sum(2), above], 1)
    by_level = [sums.view(groups, n, 2).sum(2) for sums in by_bin[1:]]
    of_correction = None if correction is None else by_level[0]
    grad_values = _values_grad(by_gap, of_correction, values)
    if not learned_gates:
        return grad_x, grad_values
    # Of x_q, plus Eqn (9), summed by level.
    return (
        grad_x,
        grad_values,
        by_level[-1] if of_correction is None else of_correction + by_level[-1],
    )


def _values_grad(by_gap: Tensor, by_level: Tensor | None, values: Tensor) -> Tensor:
    """Gradient of values [G, n]: x_q minus the straight line, plus Eqn (9).

    Let x = (1 - t) q + t q' lie between q and q'. If q is nearer, x_q minus the line is t q - t q',
    else (1 - t) q' - (1 - t) q. Either way the factor of q is (x - x_q) / (q' - q), and that of q'
    the same negated. Beyond the outer levels, x_q is the outer level alone.

    Args:
        by_gap: [G, n + 1] sums of the levels' terms below, between and above the levels.
        by_level: [G, n] sums of Eqn (9)'s lambda * (x_q - x), if there is a lambda.
        values: [G, n].
    """
    below, between, above = by_gap.tensor_split([1, values.shape[1]], 1)
    width = values.diff(dim=1)
    shares = torch.where(width > 0, between / width, 0.0)
    grad = torch.cat([shares, above], 1) - torch.cat([-below, shares], 1)
    return grad if by_level is None else grad + by_level
