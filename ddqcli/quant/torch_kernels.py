"""PyTorch's kernels of `kernels.py`: element-wise work on rows, on any device.

They take rows: [G, M], or for several tensors one row [1, N] (`layout.Rows`). The nearest level
comes from a table with one entry per half-step of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddqcli.quant.grid import grid_cells


def quantize(
    x: Tensor, nearest_value: Tensor, half_step: Tensor, zero_cell: Tensor, first_cell: Tensor
) -> Tensor:
    """Nearest level of each x; NaN where x is not finite."""
    cell = _table_index(x, half_step, zero_cell, first_cell)
    nearest = nearest_value.view(-1).index_select(0, cell).view(x.shape)
    return torch.add(nearest, x, alpha=-0.0).to(x.dtype)  # NaN where x is not finite


def straight_through(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The gradient where x lies between the outer levels, 0 elsewhere."""
    return torch.where((x >= low) & (x <= high), grad, 0.0)


def gradients(
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


def sums_by_bin(parts: Sequence[Tensor], bin_: Tensor, bins: int) -> list[Tensor]:
    """For each part its sums by bin, [bins] float32."""
    index = bin_.reshape(-1)
    if index.is_cpu:
        return [
            torch.bincount(index, weights=part.reshape(-1), minlength=bins).float()
            for part in parts
        ]
    index = index.long()
    # Unlike `scatter_add_`, this adds in a fixed order on CUDA.
    return [
        torch.zeros(bins, device=index.device, dtype=torch.float32).index_put_(
            (index,), part.reshape(-1), accumulate=True
        )
        for part in parts
    ]
