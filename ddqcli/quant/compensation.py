"""Compensated rounding (LDLQ, GPTQ): each column of a weight makes up for errors of earlier ones.

Rounding each weight to its nearest level minimizes |W - Q|^2. A network feels the error of the
layer's output y = W x over its inputs,

    E |(W - Q) x|^2 = tr (W - Q) H (W - Q)^T,    H = E x x^T.

With H = M D M^T, M unit lower triangular, and e_k column k of W - Q, this is sum_k D_k |r_k|^2,
where r_k = e_k + sum_{j > k} M_jk e_j. So the columns are rounded from the last to the first, each
to the level nearest to w_k + sum_{j > k} M_jk e_j: that makes r_k as small as one level can. This
is LDLQ (Chee et al. 2023, arXiv 2307.13304, Sec. 3), which equals GPTQ (Frantar et al. 2022, arXiv
2210.17323) and needs no inverse. The levels may be any table, as in GPTVQ (arXiv 2402.15319).

Two sweeps of coordinate descent follow: each column is put on the levels nearest to the minimum of
the same error with all other columns fixed, w_k + sum_{j != k} (H_jk / H_kk) e_j.

How much that helps is known beforehand. Rounding to nearest leaves errors e_k of about the same
size sigma, so an output error of sigma^2 tr H. Compensated, the r_k have that size, and the output
error is sigma^2 tr D. So `error_share` is tr D / tr H, whatever the levels and the bit-width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Share of H's mean diagonal that is added to it. Ten times GPTQ's: what few samples do not show is
# not to be relied on.
DAMPING = 0.1
_DESCENT_SWEEPS = 2  # more change little
_BLOCK = 128  # columns whose errors reach all earlier columns as one matrix product


@torch.no_grad()
def error_share(hessian: Tensor) -> float:
    """Return tr D / tr H: the share of the output error that compensated rounding leaves.

    Args:
        hessian: H [G, I, I], the mean of x x^T.
    """
    damped, _ = _damped(hessian)
    remaining = torch.linalg.cholesky(damped).diagonal(dim1=1, dim2=2).square()  # D
    return float(remaining.sum() / damped.diagonal(dim1=1, dim2=2).sum())


@torch.no_grad()
def compensated_rounding(
    weight: Tensor, levels: Tensor, hessian: Tensor, pull: Tensor | None = None
) -> Tensor:
    """Round G independent matrices to levels that keep their outputs near those of `weight`.

    Args:
        weight: W [G, O, I]; the groups of a convolution are independent.
        levels: ascending, [n], or [G, O, n] with one table per row.
        hessian: H [G, I, I], the mean of x x^T.
        pull: P [G, O, I]; W is first moved by P H^-1. With P the mean of (y - W x) x^T this is the
            least-squares step towards outputs y (GPTAQ, arXiv 2504.02692).

    Returns:
        Q [G, O, I] in weight's dtype; every value is one of `levels`, bit for bit.

    Raises ValueError if an argument is not finite.
    """
    if not all(x.isfinite().all() for x in (weight, hessian, pull) if x is not None):
        raise ValueError("a weight, H or P holds NaN or infinity; no level is near those")
    damped, order = _damped(hessian)
    factor = torch.linalg.cholesky(damped)
    target = _ordered_columns(weight, order)
    if pull is not None:
        target += torch.cholesky_solve(_ordered_columns(pull, order), factor)
    rounded, error = torch.zeros_like(target), torch.zeros_like(target)
    feedback = factor.tril(-1) / factor.diagonal(dim1=1, dim2=2)[:, None]  # M without its diagonal
    descent = damped / damped.diagonal(dim1=1, dim2=2)[:, None]
    descent.diagonal(dim1=1, dim2=2).zero_()
    for coupling in (feedback, *[descent] * _DESCENT_SWEEPS):
        _sweep(target, rounded, error, coupling, levels.double())
    original_order = order.argsort(1)[:, :, None].expand_as(rounded)
    return rounded.gather(1, original_order).transpose(1, 2).to(weight.dtype)


def _damped(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return damped H [G, I, I] in float64, and the order [G, I] of its columns.

    The diagonal ascends. The column with the largest inputs is last, so it is rounded first, while
    all others can still make up for its error.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2).double()
    order = diagonal.argsort(dim=1, stable=True)
    rows = order[:, :, None].expand_as(hessian)
    damped = hessian.gather(1, rows).gather(2, rows.transpose(1, 2)).double()
    mean = diagonal.mean(1, keepdim=True)
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return damped, order


def _ordered_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of [G, O, I] in `order` [G, I], as float64 [G, I, O]."""
    columns = matrix.double().transpose(1, 2)
    return columns.gather(1, order[:, :, None].expand_as(columns))


def _sweep(
    target: Tensor, rounded: Tensor, error: Tensor, coupling: Tensor, levels: Tensor
) -> None:
    """Round column k to the levels nearest to target_k + sum_j coupling_jk error_j, last k first.

    Args:
        target: [G, I, O].
        rounded, error: [G, I, O], changed in place; error is target - rounded, or 0 at first.
        coupling: [G, I, I], zero on the diagonal.
        levels: [n] or [G, O, n].
    """
    thresholds = (levels[..., 1:] + levels[..., :-1]) / 2
    for end in range(target.shape[1], 0, -_BLOCK):
        first = max(0, end - _BLOCK)
        moved = target[:, first:end] + coupling[:, :, first:end].mT @ error
        for k in range(end - 1, first - 1, -1):
            rounded[:, k] = _nearest(moved[:, k - first], levels, thresholds)
            change = target[:, k] - rounded[:, k] - error[:, k]
            error[:, k] += change
            moved[:, : k - first] += coupling[:, k, first:k, None] * change[:, None]


def _nearest(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Return the level nearest to each of x [G, O]; a tie goes to the upper one."""
    index = torch.searchsorted(thresholds, x[..., None].contiguous(), right=True)
    return levels.expand(*x.shape, -1).gather(-1, index)[..., 0]
