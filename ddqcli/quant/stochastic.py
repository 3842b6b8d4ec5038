"""Stochastic quantization between two bit-widths of a tensor, after SDQ (Huang et al., ICML 2022).

With the probability beta = sigmoid(z) a tensor has the larger of two bit-widths in a step; z is its
DBP (differentiable bit-width parameter). The choice is a hard Gumbel-sigmoid sample: larger where
z + log u - log(1 - u) >= 0, with u uniform in (0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The choice in force, as a quantizer needs it for the gradient of the DBP.

    Attributes:
        difference: the tensor at the larger bit-width minus the tensor at the smaller one.
        gate: index of the gate whose logit is the DBP.
    """

    difference: Tensor
    gate: int


def sigmoid(z: float) -> float:
    """Return 1 / (1 + e^-z); no z is too large for it."""
    return (1 + math.tanh(z / 2)) / 2


def logistic_noise(count: int, seed: int, step: int) -> list[float]:
    """Return log u - log(1 - u) of `count` uniform draws, which depend on seed and step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.rand(count, generator=generator, dtype=torch.float64).logit(1e-12).tolist()


def slope(z: float, larger: bool) -> float:
    """Return the mean slope of the soft sample in z, given the hard sample `larger`.

    The soft sample is sigmoid((z + noise) / tau). As its temperature tau goes to 0, the mean of its
    slope over the noise that leads to the same hard sample goes to (1 - beta) / 2 for the larger
    bit-width and beta / 2 for the smaller one.

    The gradient of the loss in z is this slope times the sum of G * (Q_larger - Q_smaller), where G
    is the loss's gradient at the sampled choice. For a quadratic loss, its expectation over both
    choices is exactly that of the mean loss, beta * (1 - beta) * (L_larger - L_smaller).

    >>> slope(0.0, True), slope(0.0, False)
    (0.25, 0.25)
    """
    return (1 - sigmoid(z)) / 2 if larger else sigmoid(z) / 2


def with_choice_gradient(x_q: Tensor, choice: Choice, gate_logits: Tensor) -> Tensor:
    """Return x_q; in the backward pass, the choice's gate gets the sum of G * difference.

    The gate is that of the first group, since one choice holds for all.
    """
    out: Tensor = _ChoiceGradient.apply(x_q, choice.difference, gate_logits, choice.gate)
    return out


class _ChoiceGradient(torch.autograd.Function):
    """(x_q, difference, gate_logits [G, b], gate) -> x_q."""

    @staticmethod
    def forward(
        ctx: Any, x_q: Tensor, difference: Tensor, gate_logits: Tensor, gate: int
    ) -> Tensor:
        ctx.save_for_backward(difference, gate_logits)
        ctx.gate = gate
        return x_q.view_as(x_q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        difference, gate_logits = ctx.saved_tensors
        gates_grad = torch.zeros_like(gate_logits)
        gates_grad[0, ctx.gate] = (grad.float() * difference).sum()
        return grad, None, gates_grad, None
