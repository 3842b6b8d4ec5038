"""Steps of DBPs: independent of the loss's scale, and on the schedule of the cost."""

from __future__ import annotations

import math

import pytest

from ddqcli.quant.dbp import DBP, meet


def expected(dbps: list[DBP], saved: list[int]) -> float:
    return sum(s / (1 + math.exp(-d.z)) for d, s in zip(dbps, saved, strict=True))


def dbps_of(*zs: float, squares: tuple[float, ...] | None = None) -> list[DBP]:
    squares = squares or (1.0,) * len(zs)
    return [DBP(4, 3, z, square, 9) for z, square in zip(zs, squares, strict=True)]


@pytest.mark.parametrize("cost", [120.0, 450.0, 900.0, 1070.0])
def test_after_a_step_the_expected_cost_is_the_given_one(cost: float) -> None:
    dbps, saved = dbps_of(0.0, 1.0, -2.0, 2.0, squares=(1.0, 1e-4, 9.0, 1.0)), [1000, 10, 50, 40]
    meet(dbps, saved, cost)
    assert expected(dbps, saved) == pytest.approx(cost, rel=1e-6)


def test_the_step_goes_along_the_gradient_of_the_cost() -> None:
    """In units of each loss gradient: -multiplier * p * (1 - p) * saved / rms, for small steps."""
    zs, squares, saved = (0.0, 1.0, -2.0), (4.0, 1.0, 0.25), [100, 30, 20]
    dbps = dbps_of(*zs, squares=squares)
    meet(dbps, saved, expected(dbps, saved) - 1e-3)
    moved = [d.z - z for d, z in zip(dbps, zs, strict=True)]
    ratios = []
    for z, square, s in zip(zs, squares, saved, strict=True):
        p = 1 / (1 + math.exp(-z))
        ratios.append(p * (1 - p) * s / math.sqrt(square))
    assert [m / moved[0] for m in moved] == pytest.approx([r / ratios[0] for r in ratios])
    assert moved[0] < 0


def test_where_all_larger_bit_widths_fit_nothing_moves() -> None:
    dbps = dbps_of(0.0, -1.0)
    meet(dbps, [10, 10], 20.0)
    assert [d.z for d in dbps] == [0.0, -1.0]


@pytest.mark.parametrize("cost", [-50.0, 0.0])
def test_a_cost_out_of_reach_takes_the_smaller_bit_widths(cost: float) -> None:
    dbps = dbps_of(3.0, 0.0, squares=(0.0, 0.0))  # without any gradient yet
    meet(dbps, [10, 1000], cost)
    assert all(d.probability == pytest.approx(0.01) for d in dbps)


def test_a_tensor_without_a_gradient_goes_down_first() -> None:
    dbps = dbps_of(0.0, 0.0, squares=(0.0, 1.0))
    meet(dbps, [10, 10], 8.0)
    assert dbps[0].probability < 0.31 < 0.49 < dbps[1].probability


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_loss_may_have_any_scale(scale: float) -> None:
    one, other = DBP(4, 3, 0.3), DBP(4, 3, 0.3)
    for step, difference in enumerate([0.5, -2.0, 1.0, 0.1]):
        one.descend(difference, step % 2 == 0, 0.2)
        other.descend(scale * difference, step % 2 == 0, 0.2)
    assert other.z == pytest.approx(one.z)
    assert one.z != 0.3


def test_a_first_step_is_the_rate_times_the_slope_against_the_gradient() -> None:
    dbp = DBP(4, 3, 1.0)
    dbp.descend(-7.0, True, 0.2)
    assert dbp.z == pytest.approx(1.0 + 0.2 * (1 - 1 / (1 + math.exp(-1.0))) / 2)
    dbp.descend(0.0, True, 0.2)
    assert dbp.mean_square == pytest.approx(49.0 / 2)
