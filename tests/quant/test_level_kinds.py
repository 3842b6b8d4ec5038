"""Uniform and power-of-two levels against Eqns (1) and (2) in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import oracle
import pytest
import torch
from quant_cases import normal, values_in_force

from ddqcli.quant.quantizer import DDQuantizer


def nearest_fraction(x: float, levels: list[Fraction]) -> Fraction:
    """The level nearest to x in exact arithmetic; ties go up."""
    return max(levels, key=lambda level: (-abs(level - Fraction(x)), level))


def uniform_levels(bits: int, c: Fraction) -> list[Fraction]:
    """Eqn (1) for x-bar = 0, with the 0 that it counts twice once."""
    n = 2 ** (bits - 1) - 1
    return [c * j / n for j in range(-n, n + 1)] if n else [-c, c]


def power_of_two_levels(bits: int, c: Fraction) -> list[Fraction]:
    """Eqn (2) for x-bar = 0. At one bit only the outermost two are left, as in Eqn (1)."""
    positive = [c / 2**j for j in range(1, 2 ** (bits - 1))] or [c / 2]
    return [-p for p in positive] + [Fraction(0)] * (bits > 1) + positive[::-1]


@pytest.mark.parametrize("log2_clip", [-9.3, 0.0, 3.77])
@pytest.mark.parametrize(
    ("kind", "bits"),
    [("uniform", s) for s in range(1, 8)] + [("power_of_two", s) for s in range(1, 5)],
)
def test_fixed_levels_are_those_of_eqn_1_and_eqn_2_exactly(kind, bits, log2_clip):
    for max_bits in {bits, 8}:
        quantizer = DDQuantizer(1, max_bits, kind=kind)
        quantizer.bits = (bits,)
        torch.nn.init.constant_(quantizer.log2_clip, log2_clip)
        top = Fraction(float(values_in_force(quantizer).max()))
        c = top if kind == "uniform" else 2 * top
        # c is rounded up to 12 significant bits.
        assert 2**log2_clip * (1 - 1e-6) <= c <= 2**log2_clip * (1 + 2**-10)
        levels = uniform_levels(bits, c) if kind == "uniform" else power_of_two_levels(bits, c)
        thresholds = torch.tensor([float(a + b) / 2 for a, b in itertools.pairwise(levels)])
        x = torch.cat([thresholds[::5], normal(60) * float(c), torch.tensor([1e30, -1e30])])
        expected = [nearest_fraction(v, levels) for v in x.tolist()]
        assert [Fraction(v) for v in quantizer(x).tolist()] == expected


def test_uniform_levels_at_8_bits_are_the_int8_grid():
    quantizer = DDQuantizer(1, 8, kind="uniform")
    values = values_in_force(quantizer).double()
    assert torch.equal(values / values.max() * 127, torch.arange(-128.0, 128).double())


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_power_of_two_levels_beyond_4_bits_are_those_at_4(bits):
    """More bits halve the smallest level further, but an 8-bit grid has nothing below 2^-7 of c."""
    quantizers = [DDQuantizer(1, s, kind="power_of_two") for s in (4, bits)]
    four, more = (values_in_force(q).unique() for q in quantizers)
    assert torch.equal(four, more)


@pytest.mark.parametrize("kind", ["uniform", "power_of_two"])
def test_the_clipping_threshold_gets_the_derivative_of_eqn_1_and_eqn_2(kind):
    """Levels are c times constants: d x_q / d log2 c = ln 2 (x_q - x), and ln 2 x_q outside."""
    quantizer = DDQuantizer(1, 4, kind=kind)
    x, grad = normal(1000), normal(1000, seed=1)
    out = quantizer(x)
    (found,) = torch.autograd.grad(out, quantizer.log2_clip, grad)
    inside = (x >= out.min()) & (x <= out.max())
    expected = float(grad.double() @ (out.detach().double() - x.double() * inside)) * math.log(2)
    assert float(found) == pytest.approx(expected, rel=2**-11)  # to the 12 bits of the scale

    def held(log2_clip: float) -> float:
        levels = uniform_levels if kind == "uniform" else power_of_two_levels
        values = [float(v) for v in levels(4, Fraction(2.0**log2_clip))]
        values = torch.tensor(values, dtype=torch.float64)
        line = x.double() * inside * 2.0**log2_clip  # x moves with the levels around it
        return float(grad.double() @ (values[oracle.nearest(x, values / 2.0**log2_clip)] - line))

    slope = (held(1e-4) - held(-1e-4)) / 2e-4  # the oracle's finite difference
    assert float(found) == pytest.approx(slope, rel=2**-10)
