"""Compensated rounding against plain rounding, GPTQ and coordinate descent, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import nearest, same_bits
from torch import Tensor

from ddqcli.quant.compensation import DAMPING, compensated_rounding, error_share


def correlated_inputs(groups: int, inputs: int, samples: int, seed: int) -> Tensor:
    """Inputs [G, I, N] of different size that share a few causes, in float64."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(groups, inputs, 3, generator=random, dtype=torch.float64)
    causes = torch.randn(groups, 3, samples, generator=random, dtype=torch.float64)
    own = torch.randn(groups, inputs, samples, generator=random, dtype=torch.float64)
    size = torch.rand(groups, inputs, 1, generator=random, dtype=torch.float64) + 0.1
    return size * (shared @ causes + own)


def hessian_of(x: Tensor) -> Tensor:
    return x @ x.mT / x.shape[2]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(n: int, seed: int = 0) -> Tensor:
    """Ascending float32 levels, unevenly spaced."""
    return (2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).sort().values


def tables_by_row(groups: int, rows: int, n: int) -> Tensor:
    tables = [table(n, seed) for seed in range(groups * rows)]
    return torch.stack(tables).view(groups, rows, n)


def plain(weight: Tensor, levels: Tensor) -> Tensor:
    """The nearest level of each weight, by the oracle of Eqn (3)."""
    rows = levels.expand(*weight.shape[:2], -1).flatten(0, 1)
    pairs = zip(weight.flatten(0, 1), rows, strict=True)
    return torch.stack([row[nearest(w, row)] for w, row in pairs]).view(weight.shape)


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    """Mean squared error of each matrix's outputs [G]."""
    return ((weight.double() - rounded.double()) @ x).square().sum(1).mean(1)


def gptq_then_descent(weight: Tensor, levels: Tensor, hessian: Tensor, sweeps: int = 2) -> Tensor:
    """GPTQ of one matrix [O, I], with an inverse of what is left of H for every column.

    Then coordinate descent: each column in turn to the nearest levels of the minimum of the damped
    error with the others fixed.

    Optimal Brain Quantization's update (Frantar & Alistarh 2022, Eqn 3): the rest of a row moves by
    -(w_k - q_k) / [H^-1]_kk * [H^-1]_k. Columns come in descending order of H's diagonal.
    """
    size = len(hessian)
    damped = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(size)
    moved, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    order = left = hessian.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        k, *left = left
        distance = (moved[:, k, None] - levels.double()).abs()
        rounded[:, k] = (
            levels.double().expand_as(distance).gather(1, distance.argmin(1)[:, None])[:, 0]
        )
        error = (moved[:, k] - rounded[:, k]) / inverse[0, 0]
        moved[:, left] -= error[:, None] * inverse[0, 1:]
    for k in order * sweeps:
        residual = weight.double() - rounded
        residual[:, k] = 0
        minimum = weight[:, k].double() + residual @ damped[:, k] / damped[k, k]
        distance = (minimum[:, None] - levels.double()).abs()
        rounded[:, k] = (
            levels.double().expand_as(distance).gather(1, distance.argmin(1)[:, None])[:, 0]
        )
    return rounded.to(weight.dtype)


SIZES = [(1, 3, 1), (1, 8, 20), (4, 2, 9), (6, 1, 9), (1, 5, 128), (1, 4, 129), (2, 3, 300)]


@pytest.mark.parametrize(("groups", "outputs", "inputs"), SIZES)
def test_equals_gptq_and_coordinate_descent_done_naively(
    groups: int, outputs: int, inputs: int
) -> None:
    hessian = hessian_of(correlated_inputs(groups, inputs, 500, seed=1))
    weight, levels = random_weight(groups, outputs, inputs), table(8)
    rounded = compensated_rounding(weight, levels, hessian)
    for matrix, h, expected in zip(rounded, hessian, weight, strict=True):
        assert torch.equal(matrix, gptq_then_descent(expected, levels, h))


def test_each_row_is_rounded_by_its_own_table() -> None:
    hessian = hessian_of(correlated_inputs(2, 20, 500, seed=1))
    weight, levels = random_weight(2, 3, 20), tables_by_row(2, 3, 4)
    rounded = compensated_rounding(weight, levels, hessian)
    for g in range(2):
        for o in range(3):
            expected = gptq_then_descent(weight[g, o, None], levels[g, o], hessian[g])
            assert torch.equal(rounded[g, o, None], expected)


@pytest.mark.parametrize("n", [2, 4, 16, 256])
@pytest.mark.parametrize("by_row", [False, True])
def test_values_are_levels_bit_for_bit(n: int, by_row: bool) -> None:
    hessian = hessian_of(correlated_inputs(2, 30, 200, seed=2)).float()
    levels = tables_by_row(2, 5, n) if by_row else table(n)
    rounded = compensated_rounding(random_weight(2, 5, 30), levels, hessian)
    assert rounded.dtype == torch.float32
    for g in range(2):
        for o in range(5):
            row = (levels[g, o] if by_row else levels).tolist()
            assert set(rounded[g, o].tolist()) <= set(row)


def test_levels_repeated_at_the_end_change_nothing() -> None:
    hessian = hessian_of(correlated_inputs(1, 30, 200, seed=2))
    levels, weight = table(4), random_weight(1, 5, 30)
    padded = torch.cat([levels, levels[-1:].expand(12)])
    expected = compensated_rounding(weight, levels, hessian)
    assert torch.equal(compensated_rounding(weight, padded, hessian), expected)


# ---- the error of the outputs


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("n", [4, 16, 256])
def test_outputs_have_less_error_than_with_plain_rounding(n: int, seed: int) -> None:
    x = correlated_inputs(2, 40, 400, seed)
    weight, levels = random_weight(2, 8, 40, seed=seed), torch.linspace(-3, 3, n)
    rounded = compensated_rounding(weight, levels, hessian_of(x))
    before = output_error(weight, plain(weight, levels), x)
    assert (output_error(weight, rounded, x) < 0.8 * before).all()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_uncorrelated_inputs_give_plain_rounding(scale: float) -> None:
    hessian = scale * torch.diag(torch.rand(50, dtype=torch.float64) + 0.1)[None]
    weight, levels = random_weight(1, 6, 50), table(8)
    assert torch.equal(compensated_rounding(weight, levels, hessian), plain(weight, levels))


def test_inputs_that_are_zero_give_plain_rounding() -> None:
    weight, levels = random_weight(2, 6, 30), table(8)
    rounded = compensated_rounding(weight, levels, torch.zeros(2, 30, 30), torch.zeros(2, 6, 30))
    assert torch.equal(rounded, plain(weight, levels))


@pytest.mark.parametrize("samples", [1, 5])
def test_fewer_samples_than_inputs_suffice(samples: int) -> None:
    """H is rank-deficient; some inputs are always zero, and some are copies of others."""
    x = correlated_inputs(1, 40, samples, seed=3)
    x[:, 5:10], x[:, 10:15] = 0, x[:, 20:25]
    weight, levels = random_weight(1, 4, 40), torch.linspace(-3, 3, 16)
    rounded = compensated_rounding(weight, levels, hessian_of(x).float())
    assert torch.equal(rounded[:, :, 5:10], plain(weight, levels)[:, :, 5:10])
    before = output_error(weight, plain(weight, levels), x)
    assert output_error(weight, rounded, x) < 0.5 * before


# ---- the pull


def test_the_pull_moves_weights_to_the_least_squares_fit() -> None:
    """With fine levels, the outputs are those of ridge regression on the quantized inputs."""
    x = correlated_inputs(2, 10, 400, seed=4)
    weight, levels = random_weight(2, 3, 10), torch.linspace(-8, 8, 2**16)
    y = weight.double() @ x + torch.randn(2, 3, 400, dtype=torch.float64)
    hessian = hessian_of(x)
    pull = (y - weight.double() @ x) @ x.mT / 400
    rounded = compensated_rounding(weight, levels, hessian, pull)
    for g in range(2):
        ridge = DAMPING * hessian[g].diagonal().mean().sqrt() ** 2 * torch.eye(10)
        rows = torch.cat([x[g].T / math.sqrt(400), torch.linalg.cholesky(ridge).T])
        residual = (y[g] - weight[g].double() @ x[g]).T / math.sqrt(400)
        step = torch.linalg.lstsq(rows, torch.cat([residual, torch.zeros(10, 3)])).solution.T
        assert torch.allclose(rounded[g].double(), weight[g] + step, atol=2e-3)


def test_the_weight_and_the_levels_stay_as_they_are() -> None:
    weight, levels = random_weight(1, 4, 20), table(8)
    before = weight.clone(), levels.clone()
    hessian = hessian_of(correlated_inputs(1, 20, 100, seed=5))
    compensated_rounding(weight, levels, hessian, torch.ones(1, 4, 20))
    assert same_bits(weight, before[0])
    assert same_bits(levels, before[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weight", "hessian", "pull"])
def test_what_is_not_finite_is_refused(where: str, value: float) -> None:
    arguments = {
        "weight": random_weight(1, 5, 5),
        "hessian": torch.eye(5)[None].clone(),
        "pull": torch.zeros(1, 5, 5),
    }
    arguments[where][0, 4, 4] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        compensated_rounding(levels=table(8), **arguments)


# ---- the share of the error that is left


def damped(hessian: Tensor) -> Tensor:
    size = len(hessian)
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(size, dtype=hessian.dtype)


@pytest.mark.parametrize(("groups", "inputs"), [(1, 1), (1, 8), (3, 5)])
def test_the_error_share_is_that_of_conditional_variances(groups: int, inputs: int) -> None:
    """D_k is the variance of input k given those that are rounded after it."""
    hessian = hessian_of(correlated_inputs(groups, inputs, 50, seed=3))
    left = total = 0.0
    for h in hessian:
        order = h.diagonal().argsort().tolist()
        for count in range(1, inputs + 1):
            block = damped(h)[order[:count]][:, order[:count]]
            left += 1 / float(torch.linalg.inv(block)[-1, -1])
            total += float(block[-1, -1])
    assert error_share(hessian) == pytest.approx(left / total, rel=1e-9)


@pytest.mark.parametrize("levels", [8, 16, 64])
def test_the_error_share_predicts_what_compensation_gains(levels: int) -> None:
    """The prediction is from the inputs alone. Coordinate descent gains a little more."""
    x = correlated_inputs(1, 60, 4000, seed=4)
    weight, grid = random_weight(1, 40, 60), torch.linspace(-4, 4, levels)
    before, after = (
        float(output_error(weight, rounded, x))
        for rounded in (plain(weight, grid), compensated_rounding(weight, grid, hessian_of(x)))
    )
    assert 0.6 * error_share(hessian_of(x)) < after / before < 1.15 * error_share(hessian_of(x))


def test_independent_inputs_leave_the_whole_error() -> None:
    assert error_share(torch.diag(torch.rand(9, dtype=torch.float64) + 0.1)[None]) == pytest.approx(
        1, rel=1e-12
    )
    assert error_share(torch.zeros(1, 4, 4)) == 1
