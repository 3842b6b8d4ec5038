"""Straight-through estimator: a new value with the old value's gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class ReplaceForward(torch.autograd.Function):
    """(x, y) -> y, with the gradient of x.

    The usual x + (y - x).detach() does not return y exactly in float32.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
