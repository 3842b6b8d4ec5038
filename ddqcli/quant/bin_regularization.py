"""Entropy-aware bin regularization, after SDQ (Huang et al., ICML 2022, their Eqn 10).

The term pulls each weight to its level, and spreads the weights of a tensor evenly over its levels.
SDQ's is a sum over bins of the squared distance of the bin's mean to its level and the variance
within the bin, which together are the squared distance of the weights to their levels. The entropy
part is ours, since SDQ's could not be obtained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALLEST_SHARE = 1e-6


def bin_regularization(x: Tensor, levels: Tensor) -> Tensor:
    """Return mean (x_q - x)^2 / mean x^2 + 1 - H(p) / log k, the mean over groups.

    x_q is the level nearest to x, and k the number of distinct levels. p are the shares of the
    values at each level, made smooth: a value between two levels counts for both, in proportion to
    its nearness. H(p) = -sum p log(p + 1e-6) is their entropy, with a finite slope at an empty
    level. So the first part is 0 if all values lie on levels, and the second if they are evenly
    spread over them; either is at most about 1.

    Args:
        x: [G, M] values; the gradient goes to them alone.
        levels: [G, n] ascending, in units of x; repeated ones count once.

    >>> levels = torch.tensor([[0.0, 1.0]])
    >>> round(float(bin_regularization(torch.tensor([[0.0, 1.0]]), levels)), 4)  # on both, evenly
    0.0
    >>> round(float(bin_regularization(torch.tensor([[1.0, 1.0]]), levels)), 4)  # on one of them
    1.0
    """
    values = x.shape[1]
    first = torch.searchsorted(levels, levels)  # index of each level's first occurrence
    lower = torch.searchsorted(levels, x.detach().contiguous(), right=True) - 1
    lower = lower.clamp(0, max(levels.shape[1] - 2, 0))
    upper = (lower + 1).clamp_max(levels.shape[1] - 1)
    below, above = levels.gather(1, lower), levels.gather(1, upper)
    error = torch.minimum((x - below).square(), (x - above).square()).mean(1)
    error = error / x.detach().square().mean(1).clamp_min(torch.finfo(x.dtype).tiny)

    width = (above - below).clamp_min(torch.finfo(x.dtype).tiny)
    share = torch.where(above > below, ((x - below) / width).clamp(0, 1), 0.0)
    shares = torch.zeros_like(levels).scatter_add(1, first.gather(1, lower), 1 - share)
    shares = shares.scatter_add(1, first.gather(1, upper), share) / values
    entropy = -(shares * (shares + _SMALLEST_SHARE).log()).sum(1)
    distinct = (levels.diff(dim=1) > 0).sum(1) + 1
    most = distinct.to(x.dtype).log().clamp_min(math.log(2))
    return (error + torch.where(distinct > 1, 1 - entropy / most, 0.0)).mean()
