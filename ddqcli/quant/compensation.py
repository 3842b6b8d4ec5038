"""Compensated rounding: columns still to come make good the error of each rounded column (GPTQ).

A layer computes y = W x. Rounding each weight to its nearest level minimizes |W - Q|^2, but what matters is the error of the
output over the layer's inputs,

    E |(W - Q) x|^2 = tr (W - Q) H (W - Q)^T,    H = E x x^T.

With H = M D M^T, M unit lower triangular, this is sum_k D_k |r_k|^2, where r_k = e_k + sum_{j > k} M_jk e_j and e = W - Q by
column. So the columns are rounded from the last to the first, each to the level nearest to w_k + sum_{j > k} M_jk e_j, which
makes every r_k as small as one level can. This is LDLQ (Chee et al. 2023, arXiv 2307.13304, Sec. 3), and the same as GPTQ
(Frantar et al. 2022, arXiv 2210.17323) without an inverse; the levels are any table, as in GPTVQ (arXiv 2402.15319).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = (
    0.01  # of H's mean diagonal, added to it: GPTQ's; what has few samples or none stays solvable
)
_BLOCK = 128  # columns whose errors are applied to the rest at once, as one matrix product


@torch.no_grad()
def compensated(
    weight: Tensor, levels: Tensor, hessian: Tensor, pull: Tensor | None = None
) -> Tensor:
    """The members of `levels` that keep the outputs of G independent matrices near those of `weight`.

    Args:
        weight: W [G, O, I]; a convolution's groups are its G, all else has G = 1.
        levels: [n] ascending, or [G, O, n] for a table of each row.
        hessian: H [G, I, I], the mean of x x^T.
        pull: P [G, O, I]; W is first moved by P H^-1. With P the mean of (y - W x) x^T that is the least-squares
            step to the outputs y (GPTAQ, arXiv 2504.02692).

    Returns:
        Q [G, O, I] in weight's dtype, each value bit for bit one of `levels`.
    """
    factor, order = _factor(hessian)
    target = _columns(weight, order)
    if pull is not None:
        target += torch.cholesky_solve(_columns(pull, order), factor)
    feedback = factor / factor.diagonal(dim1=1, dim2=2)[:, None]  # M
    rounded = _round_from_last(target, levels, feedback)
    back = order.argsort(1)[:, :, None].expand_as(rounded)
    return rounded.gather(1, back).transpose(1, 2).to(weight.dtype)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """E |e x|^2 = tr e H e^T of each matrix of weight errors: [G, O, I], [G, I, I] -> [G]."""
    wide = error.to(hessian.dtype)
    return ((wide @ hessian) * wide).sum((1, 2))


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor L [G, I, I] of H, damped, its columns by ascending diagonal, and that order [G, I].

    The last column is rounded first, while all others can still make its error good: the one that inputs drive most.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2).double()
    order = diagonal.argsort(dim=1, stable=True)
    row = order[:, :, None].expand(-1, -1, order.shape[1])
    ordered = hessian.gather(1, row).gather(2, row.transpose(1, 2)).double()
    mean = diagonal.mean(1, keepdim=True)
    ordered.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return torch.linalg.cholesky(ordered), order


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """[G, O, I] as float64 [G, I, O], columns in `order` [G, I]."""
    turned = matrix.double().transpose(1, 2)
    return turned.gather(1, order[:, :, None].expand_as(turned))


def _round_from_last(target: Tensor, levels: Tensor, feedback: Tensor) -> Tensor:
    """Each column [G, O] of target [G, I, O] on the level nearest to it with the errors after it fed back."""
    rounded, error = torch.empty_like(target), torch.empty_like(target)
    nearest = _Nearest(levels)
    for end in range(target.shape[1], 0, -_BLOCK):
        first = max(0, end - _BLOCK)
        due = target[:, first:end] + feedback[:, end:, first:end].transpose(1, 2) @ error[:, end:]
        for k in range(end - 1, first - 1, -1):
            later = feedback[:, k + 1 : end, k, None].transpose(1, 2) @ error[:, k + 1 : end]
            rounded[:, k] = nearest(due[:, k - first] + later[:, 0])
            error[:, k] = target[:, k] - rounded[:, k]
    return rounded


class _Nearest:
    """Values [G, O] -> the nearest of [n] or [G, O, n] levels; half-way, the upper one, as in `nearest_table`."""

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels.double()
        self.thresholds = (self.levels[..., 1:] + self.levels[..., :-1]) / 2

    def __call__(self, x: Tensor) -> Tensor:
        index = torch.searchsorted(self.thresholds, x[..., None].contiguous(), right=True)
        return self.levels.expand(*x.shape, -1).gather(-1, index)[..., 0]
