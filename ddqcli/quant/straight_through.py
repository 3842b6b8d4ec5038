"""An autograd function that replaces a value and passes its gradient through."""

from __future__ import annotations

import torch
from torch import Tensor


class ReplaceForward(torch.autograd.Function):
    """(x, y) -> y, with the gradient of x: rounding that the gradient passes straight through, without x + (y - x)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
