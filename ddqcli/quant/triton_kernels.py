"""Triton's kernels: one launch forward, and two backward, for a tensor of any number of levels.

Those of learned levels take G groups of values, one after another: group g begins at `starts[g]`
and ends at `starts[g + 1]`. Values are float32, bfloat16 or float16; the arithmetic is float32.
Each program writes its own sums, and a second kernel adds them in a fixed order. Without atomics,
the same input gives the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_CELLS = tl.constexpr(512)  # grid.GRID_CELLS, entries of a table

# Arguments whose value or alignment is no reason to compile a kernel again: read once a program.
_PLAIN = [
    *("blocks", "programs", "low", "high"),
    *("starts_ptr", "values_ptr", "half_step_ptr", "zero_cell_ptr", "correction_ptr", "scale_ptr"),
]


# ---- learned levels


@triton.jit
def _cell(x, half_step, zero_cell):
    """grid.grid_cells; 0 for NaN. `div_rn` rounds correctly, as a plain division does not.

    On a GPU, `floor` takes a subnormal quotient, below 2^-126 half-steps, for 0.
    """
    cell = tl.floor(tl.div_rn(x, half_step)) + zero_cell
    return tl.minimum(tl.maximum(cell, 0.0), _CELLS - 1.0).to(tl.int32)


@triton.jit
def _place(starts_ptr, group, longest, ALONE: tl.constexpr):
    """Return the start of a group, and its number of values."""
    start, size = 0, longest  # known to begin at 0, values are loaded several at a time
    if not ALONE:
        start = tl.load(starts_ptr + group)
        size = (tl.load(starts_ptr + group + 1) - start).to(tl.int32)
    return start, size


@triton.jit
def _finite_or_nan(x, value):
    return tl.where(x - x == 0.0, value, float("nan"))


@triton.jit(do_not_specialize=_PLAIN)
def quantize_kernel(
    x_ptr,
    out_ptr,
    starts_ptr,
    nearest_ptr,
    half_step_ptr,
    zero_cell_ptr,
    longest,
    blocks,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    row, size = _place(starts_ptr, group, longest, ALONE)
    mask = index < size
    x = tl.load(x_ptr + row + index, mask=mask, other=0.0).to(tl.float32)
    cell = _cell(x, tl.load(half_step_ptr + group), tl.load(zero_cell_ptr + group))
    nearest = tl.load(nearest_ptr + group * _CELLS + cell)
    tl.store(out_ptr + row + index, _finite_or_nan(x, nearest), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def straight_through_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    starts_ptr,
    values_ptr,
    longest,
    blocks,
    ALONE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    row, size = _place(starts_ptr, group, longest, ALONE)
    mask = index < size
    x = tl.load(x_ptr + row + index, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row + index, mask=mask, other=0.0)
    low = tl.load(values_ptr + group * N)
    high = tl.load(values_ptr + group * N + N - 1)
    inside = (x >= low) & (x <= high)
    tl.store(out_ptr + row + index, tl.where(inside, grad, 0.0), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def level_sums_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_ptr,
    starts_ptr,
    values_ptr,
    nearest_ptr,
    bin_ptr,
    half_step_ptr,
    zero_cell_ptr,
    correction_ptr,
    longest,
    programs,
    ALONE: tl.constexpr,
    N: tl.constexpr,
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
    CORRECTED: tl.constexpr,
    GATED: tl.constexpr,
):
    """The gradient of x, and this program's sums: n + 1 by gap, then n by level twice, if needed.

    Each lane adds its own values; the lanes are added once, at the end.
    """
    group, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    row, size = _place(starts_ptr, group, longest, ALONE)
    table = group * _CELLS
    half_step, zero_cell = tl.load(half_step_ptr + group), tl.load(zero_cell_ptr + group)
    low = tl.load(values_ptr + group * N)
    high = tl.load(values_ptr + group * N + N - 1)
    levels = tl.arange(0, N)[:, None]
    by_gap = tl.zeros([N, LANES], tl.float32)
    above = tl.zeros([LANES], tl.float32)
    correction = 0.0
    by_level = tl.zeros([N, LANES], tl.float32)
    grad_by_level = tl.zeros([N, LANES], tl.float32)
    if CORRECTED:
        correction = tl.load(correction_ptr + group)
    for start in range(program * LANES, size, programs * LANES):
        index = start + tl.arange(0, LANES)
        mask = index < size
        x = tl.load(x_ptr + row + index, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row + index, mask=mask, other=0.0)
        cell = _cell(x, half_step, zero_cell)
        nearest = tl.load(nearest_ptr + table + cell)
        bin_ = tl.load(bin_ptr + table + cell).to(tl.int32)
        inside = (x >= low) & (x <= high)
        tl.store(grad_x_ptr + row + index, tl.where(inside, grad, 0.0), mask=mask)
        grad = grad.to(tl.float32)
        term = tl.where(inside, x - nearest, 1.0) * grad
        gap, level = ((bin_ + 1) >> 1)[None, :], (bin_ >> 1)[None, :]
        by_gap += tl.where(gap == levels, term[None, :], 0.0)
        above += tl.where(bin_ == 2 * N - 1, term, 0.0)
        if CORRECTED:
            residual = tl.where(mask, correction * (nearest - x), 0.0)
            by_level += tl.where(level == levels, residual[None, :], 0.0)
        if GATED:
            grad_by_level += tl.where(level == levels, grad[None, :], 0.0)
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS
    slots = tl.arange(0, N)
    tl.store(out_ptr + slots, tl.sum(by_gap, 1))
    tl.store(out_ptr + N, tl.sum(above, 0))
    if CORRECTED:
        tl.store(out_ptr + N + 1 + slots, tl.sum(by_level, 1))
    if GATED:
        tl.store(out_ptr + SUMS - N + slots, tl.sum(grad_by_level, 1))


@triton.jit(do_not_specialize=_PLAIN)
def level_gradients_kernel(
    partial_ptr,
    values_ptr,
    grad_values_ptr,
    grad_for_gates_ptr,
    programs,
    N: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    CORRECTED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Add the programs' sums of one group, and make the gradients of its levels of them."""
    group, k = tl.program_id(0), tl.arange(0, N)
    below = tl.zeros([ROWS, N], tl.float32)  # of the gap below each level
    above = tl.zeros([ROWS, N], tl.float32)
    by_level = tl.zeros([ROWS, N], tl.float32)
    grad_by_level = tl.zeros([ROWS, N], tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        mask = (program < programs)[:, None]
        sums = partial_ptr + (group.to(tl.int64) * programs + program)[:, None] * SUMS + k[None, :]
        below += tl.load(sums, mask=mask, other=0.0)
        above += tl.load(sums + 1, mask=mask, other=0.0)
        if CORRECTED:
            by_level += tl.load(sums + N + 1, mask=mask, other=0.0)
        if GATED:
            grad_by_level += tl.load(sums + SUMS - N, mask=mask, other=0.0)
    values_ptr += group * N
    value = tl.load(values_ptr + k)
    width_below = value - tl.load(values_ptr + tl.maximum(k - 1, 0))
    width_above = tl.load(values_ptr + tl.minimum(k + 1, N - 1)) - value
    share_below = _share(tl.sum(below, 0), width_below)
    share_above = _share(tl.sum(above, 0), width_above)
    # The gaps beyond the outer levels belong to those alone, and have no width.
    share_below = tl.where(k == 0, -tl.sum(below, 0), share_below)
    share_above = tl.where(k == N - 1, tl.sum(above, 0), share_above)
    correction = tl.sum(by_level, 0)
    tl.store(grad_values_ptr + group * N + k, share_above - share_below + correction)
    if GATED:
        for_gates = correction + tl.sum(grad_by_level, 0)
        tl.store(grad_for_gates_ptr + group * N + k, for_gates)


@triton.jit
def _share(between, width):
    return tl.where(width > 0.0, tl.div_rn(between, tl.where(width > 0.0, width, 1.0)), 0.0)


# ---- a uniform step


@triton.jit
def _round(x):
    """Half to even, for |x| < 2^22; 0 for -0."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: from there on, floats are whole numbers


@triton.jit(do_not_specialize=_PLAIN)
def uniform_quantize_kernel(x_ptr, out_ptr, scale_ptr, low, high, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, scale = index < size, tl.load(scale_ptr)
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    steps = tl.div_rn(x, scale)
    code = _round(tl.minimum(tl.maximum(steps, low.to(tl.float32)), high.to(tl.float32)))
    tl.store(out_ptr + index, _finite_or_nan(x, code * scale), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def uniform_gradients_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_ptr,
    scale_ptr,
    low,
    high,
    size,
    programs,
    BLOCK: tl.constexpr,
):
    scale, total = tl.load(scale_ptr), tl.zeros([BLOCK], tl.float32)
    low, high = low.to(tl.float32), high.to(tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < size
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
        steps = tl.div_rn(x, scale)
        code = _round(tl.minimum(tl.maximum(steps, low), high))
        code = tl.where(steps == steps, code, steps)  # NaN stays NaN, for all to see
        inside = (steps >= low) & (steps <= high)
        tl.store(grad_x_ptr + index, tl.where(inside, grad, 0.0), mask=mask)
        total += grad.to(tl.float32) * (code - tl.where(inside, steps, 0.0))
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))
