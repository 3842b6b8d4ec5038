"""Bin regularization against its formula, value by value in float64, and against differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddqcli.quant.bin_regularization import bin_regularization


def brute_force(x: list[float], levels: list[float]) -> float:
    """The formula of METHOD.md, one value after the other."""
    levels = sorted(set(levels))
    error = sum(min((v - q) ** 2 for q in levels) for v in x) / sum(v**2 for v in x)
    if len(levels) == 1:
        return error
    shares = dict.fromkeys(levels, 0.0)
    for v in x:
        inside = min(max(v, levels[0]), levels[-1])
        for q, r in itertools.pairwise(levels):
            if q <= inside <= r:
                shares[q] += (r - inside) / (r - q) / len(x)
                shares[r] += (inside - q) / (r - q) / len(x)
                break
    entropy = -sum(p * math.log(p + 1e-6) for p in shares.values())
    return error + 1 - entropy / math.log(len(levels))


CASES = {
    "two levels": [-1.0, 0.7],
    "four levels": [-1.3, -0.4, 0.1, 1.1],
    "0 twice, as Eqn (1) has it": [-1.0, 0.0, 0.0, 1.0],
    "the last level repeated": [-0.8, 0.2, 0.9, 0.9],
    "one level, repeated": [0.3, 0.3],
    "a level that no value is near": [-1.0, 0.0, 1.0, 40.0],
    "32 levels": [k / 8 - 2 for k in range(32)],
}


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_that_of_the_formula(name: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 50, dtype=torch.float64)
    x[0, 0] = CASES[name][0]  # on a level
    levels = torch.tensor(CASES[name], dtype=torch.float64).expand(3, -1).contiguous()
    expected = sum(brute_force(row.tolist(), CASES[name]) for row in x) / 3
    assert float(bin_regularization(x, levels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["two levels", "four levels", "the last level repeated"])
def test_the_gradient_is_that_of_the_value_with_the_sum_of_squares_held(name: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([CASES[name]], dtype=torch.float64)
    bin_regularization(x, levels).backward()
    values, scale = x.detach()[0].tolist(), float(x.detach().square().mean())

    def at(k: int, by: float) -> float:
        moved = [v + by * (j == k) for j, v in enumerate(values)]
        value = brute_force(moved, CASES[name])
        distinct = sorted(set(CASES[name]))
        error = sum(min((v - q) ** 2 for q in distinct) for v in moved)
        return value - error / sum(v**2 for v in moved) + error / len(moved) / scale

    assert x.grad is not None
    for k in range(12):
        difference = (at(k, 1e-6) - at(k, -1e-6)) / 2e-6
        assert float(x.grad[0, k]) == pytest.approx(difference, rel=1e-5, abs=1e-8)


def test_weights_come_closer_to_their_levels_and_fill_the_bins_more_evenly() -> None:
    """Against the pull to the nearest level alone, more of them go to the emptier levels."""
    torch.manual_seed(3)
    x, levels = torch.randn(1, 4000) * 0.5, torch.tensor([[-1.0, -0.33, 0.33, 1.0]])
    regularized, pulled = x.clone(), x.clone()
    for _ in range(30):
        leaf = regularized.detach().requires_grad_()
        bin_regularization(leaf, levels).backward()
        assert leaf.grad is not None
        regularized = regularized - 0.002 * leaf.numel() * leaf.grad
        pulled = pulled - 0.002 * 2 * (pulled - nearest(pulled, levels)) / pulled.square().mean()
    error, error_before = ((w - nearest(w, levels)).abs().mean() for w in (regularized, x))
    assert error < 0.8 * error_before
    outer, outer_if_pulled = ((w.abs() > 0.5).sum() for w in (regularized, pulled))
    assert outer > 1.1 * outer_if_pulled  # of the inner values, those nearer to an outer level


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return levels[0, (x[..., None] - levels[0]).abs().argmin(-1)]


@pytest.mark.parametrize("x", [torch.zeros(1, 5), torch.full((1, 5), 2.0)])
def test_constant_weights_give_finite_gradients(x: Tensor) -> None:
    x.requires_grad_()
    bin_regularization(x, torch.tensor([[-1.0, 0.0, 1.0, 2.0]])).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
