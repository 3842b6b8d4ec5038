"""Fake-quantize with a uniform step: rounding and its gradients, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddqcli.quant import operators
from ddqcli.quant.layout import from_rows, match_layout, to_rows


class UniformFakeQuantize(torch.autograd.Function):
    """(x, scale, low, high, use_compiled) -> x rounded to codes low..high times the scalar `scale`.

    Only x is saved for the backward pass, as by a float layer. NaN where x is not finite.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, use_compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = (low, high, use_compiled)
        rows = to_rows(x, 0, 1)

        def by_torch() -> Tensor:
            return _quantize(rows, scale, low, high)

        def by_operator() -> Tensor:
            return torch.ops.ddq.uniform_quantize(rows, scale, low, high)  # type: ignore[no-any-return]

        return from_rows(operators.preferred(by_operator, by_torch, use_compiled, x), x, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high, use_compiled = ctx.constants
        grad, rows = to_rows(match_layout(grads[0], x), 0, 1), to_rows(x, 0, 1)

        def by_torch() -> tuple[Tensor, Tensor]:
            return _gradients(grad, rows, scale, low, high)

        def by_operator() -> tuple[Tensor, Tensor]:
            return torch.ops.ddq.uniform_gradients(grad, rows, scale, low, high)  # type: ignore[no-any-return]

        grad_x, grad_scale = operators.preferred(by_operator, by_torch, use_compiled, grad, x)
        return from_rows(grad_x, x, 0), grad_scale, None, None, None


def _quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    _, code = _steps_and_code(x, scale, low, high)
    code = torch.add(code, x, alpha=-0.0)  # 0 for -0, NaN where x is not finite
    return (code * scale).to(x.dtype)


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Straight through within the range, and LSQ's gradient of the step (Esser 2020, Eqn 3)."""
    steps, code = _steps_and_code(x, scale, low, high)
    inside = (steps >= low) & (steps <= high)
    slope = code - torch.where(inside, steps, 0.0)
    return torch.where(inside, grad, 0.0), (grad.float() * slope).sum()


def _steps_and_code(x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """x in units of the step size, and the code it is rounded to."""
    steps = x.float() / scale
    return steps, torch.clamp(torch.round(steps), low, high)
