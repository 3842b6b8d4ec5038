"""Launches of Triton's kernels: how many programs share a tensor, and what they write.

Imports Triton, so only `operators.py` may import this module, where Triton is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddqcli.quant import triton_kernels as kernels

_BLOCK = 1024  # values that one program quantizes
_PROGRAMS = 1056  # at most for a tensor's sums: 8 for each of the 132 multiprocessors of an H100
_SUMS = 8192  # partial sums that a program holds in registers
_ROWS = 64  # partial sums of as many programs are added at once


def quantize(
    x: Tensor,
    starts: Tensor,
    longest: int,
    nearest_value: Tensor,
    half_step: Tensor,
    zero_cell: Tensor,
) -> Tensor:
    """Return the nearest level of each x, by tables [G, 512]; NaN where it is not finite.

    `starts` [G + 1] says where the groups begin in x; `longest` is the most values of one of them.
    """
    out = torch.empty_like(x)
    blocks = _ceil_div(longest, _BLOCK)
    kernels.quantize_kernel[(blocks * len(nearest_value),)](
        *(x, out, starts, nearest_value, half_step, zero_cell, longest, blocks),
        ALONE=len(nearest_value) == 1,
        BLOCK=_BLOCK,
    )
    return out


def straight_through(
    grad: Tensor, x: Tensor, starts: Tensor, longest: int, values: Tensor
) -> Tensor:
    """Return grad where x lies between the outer ones of `values` [G, n], 0 elsewhere."""
    out = torch.empty_like(grad)
    groups, n = values.shape
    blocks = _ceil_div(longest, _BLOCK)
    kernels.straight_through_kernel[(blocks * groups,)](
        *(grad, x, out, starts, values, longest, blocks), ALONE=groups == 1, N=n, BLOCK=_BLOCK
    )
    return out


def level_gradients(
    grad: Tensor,
    x: Tensor,
    starts: Tensor,
    longest: int,
    values: Tensor,
    nearest_value: Tensor,
    bin_: Tensor,
    half_step: Tensor,
    zero_cell: Tensor,
    correction: Tensor | None,
    learned_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of values [G, n], and of values for the gates [G, n].

    The last is empty without learned gates. `correction` is [G]. See `fake_quantize.py` for the
    formulas.
    """
    groups, n = values.shape
    corrected = correction is not None
    lanes = max(32, min(1024, _SUMS // (n * (1 + corrected + learned_gates))))
    lanes = 1 << (lanes.bit_length() - 1)
    programs = max(1, min(_ceil_div(longest, 4 * lanes), _PROGRAMS // groups))
    sums = n + 1 + n * corrected + n * learned_gates
    grad_x = torch.empty_like(grad)
    partial = torch.empty(groups, programs, sums, device=x.device, dtype=torch.float32)
    kernels.level_sums_kernel[(groups * programs,)](
        *(grad, x, grad_x, partial, starts, values, nearest_value, bin_, half_step, zero_cell),
        values if correction is None else correction,
        longest,
        programs,
        ALONE=groups == 1,
        N=n,
        SUMS=sums,
        LANES=lanes,
        CORRECTED=corrected,
        GATED=learned_gates,
    )
    grad_values = torch.empty_like(values)
    grad_for_gates = torch.empty_like(values) if learned_gates else values.new_empty(0)
    kernels.level_gradients_kernel[(groups,)](
        *(partial, values, grad_values, grad_for_gates),
        programs,
        N=n,
        SUMS=sums,
        ROWS=min(_ROWS, _SUMS // 2 // n),
        CORRECTED=corrected,
        GATED=learned_gates,
    )
    return grad_x, grad_values, grad_for_gates


def uniform_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return x [1, M] rounded to codes low..high times `scale`; NaN where it is not finite."""
    out = torch.empty_like(x)
    size = x.numel()
    kernels.uniform_quantize_kernel[(_ceil_div(size, _BLOCK),)](
        x, out, scale, low, high, size, BLOCK=_BLOCK
    )
    return out


def uniform_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [1, M] and, as LSQ's, of the scalar `scale`."""
    grad_x, size = torch.empty_like(grad), x.numel()
    programs = max(1, min(_ceil_div(size, 4 * _BLOCK), _PROGRAMS))
    partial = torch.empty(programs, device=x.device, dtype=torch.float32)
    kernels.uniform_gradients_kernel[(programs,)](
        grad, x, grad_x, partial, scale, low, high, size, programs, BLOCK=_BLOCK
    )
    return grad_x, partial.sum()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
