"""Eqn (3) as the paper prints it, in float64: Kronecker product, argmin, one-hot, matrix product.

What the paper leaves open is decided as in the package: R rounds to the level grid after averaging,
and a tie goes to the upper level.
"""

from __future__ import annotations

import itertools
from functools import reduce

import torch
from torch import Tensor


def matrix(bits: int, max_bits: int) -> tuple[Tensor, float]:
    """U [2^b, 2^b] and Z_U for s open gates: U_i = g_i I + (1 - g_i) 1, open gates first."""
    identity, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    factors = [identity if i < bits else ones for i in range(max_bits)]
    return reduce(torch.kron, factors), float(2 ** (max_bits - bits))


def averaged(levels: Tensor, bits: int) -> Tensor:
    """q^T U / Z_U without repeats: [2^b] positions in any order -> [2^s] ascending."""
    u, z = matrix(bits, (len(levels) - 1).bit_length())
    return (levels.double().sort().values @ u / z)[:: int(z)]


def effective(levels: Tensor, bits: int) -> Tensor:
    """R(q^T U / Z_U): the levels in force, whole numbers of the grid."""
    return averaged(levels, bits).round().clamp(0, 255)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """argmin_j |values_j - x| of each x in exact arithmetic; the last of several minima."""
    a, b = values.double()[None], x.double().reshape(-1, 1)
    difference = a - b
    part = difference - a
    # The rounding error of the difference, by Knuth's TwoSum, decides between equal differences.
    error = ((a - (difference - part)) + (-b - part)) * difference.sign()
    smallest = difference.abs() == difference.abs().min(1, keepdim=True).values
    error = torch.where(smallest, error, torch.inf)
    minima = error == error.min(1, keepdim=True).values
    last = torch.where(minima, torch.arange(len(values)), -1).max(1).values
    return last.view(x.shape)


def one_hot(index: Tensor, n: int) -> Tensor:
    """x_o: [N] -> [N, n] of zeros and ones."""
    return torch.nn.functional.one_hot(index.reshape(-1).long(), n).double()


def quantize(x: Tensor, levels: Tensor, bits: int, scale: float, zero_point: float) -> Tensor:
    """Eqn (3) for one group: float64, shape of x."""
    values = (effective(levels, bits) - zero_point) * scale
    return (one_hot(nearest(x, values), len(values)) @ values).view(x.shape)


def quantize_groups(
    x: Tensor, levels: Tensor, bits: tuple[int, ...], scale: Tensor, zero: Tensor, axis: int
) -> Tensor:
    """Eqn (3) slice by slice along `axis`, each with its own levels, gates and grid."""
    slices = x.unbind(axis) if len(bits) > 1 else [x]
    groups = zip(slices, levels, bits, scale.tolist(), zero.tolist(), strict=True)
    quantized = [quantize(*group) for group in groups]
    return torch.stack(quantized, axis) if len(bits) > 1 else quantized[0]


def edge_cases(scale: float, zero_point: float) -> Tensor:
    """All half-steps of the grid, where decisions lie, one ulp on either side, and far out."""
    points = ((torch.arange(-3, 514, dtype=torch.float64) / 2 - zero_point) * scale).float()
    inf = torch.tensor(torch.inf)
    far = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e30, -1e30, 3.4028234e38, -3.4028234e38]
    )
    return flushed(torch.cat([points, points.nextafter(inf), points.nextafter(-inf), far]), scale)


def flushed(x: Tensor, scale: float) -> Tensor:
    """x, with 0 where the quotient x / half-step underflows float32."""
    return torch.where(x.double().abs() > scale / 2 * 2.0**-150, x, 0.0)


def all_bits() -> list[tuple[int, int]]:
    """Every (max_bits b, bits s) with 1 <= s <= b <= 8."""
    return [(b, s) for b, s in itertools.product(range(1, 9), repeat=2) if s <= b]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if b as a's dtype equals a bit for bit: NaN equals NaN, 0 differs from -0."""
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(integer), b.to(a.dtype).contiguous().view(integer)
    )
