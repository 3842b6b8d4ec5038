"""Eqn (3) as the paper prints it, in float64: Kronecker product, argmin over all levels, one-hot vector, matrix product.

What the paper leaves open is decided as in the package: R rounds to the level grid after averaging, and of two levels
equally near the upper one wins.
"""

from __future__ import annotations

import itertools
from functools import reduce

import torch
from torch import Tensor


def matrix(bits: int, max_bits: int) -> tuple[Tensor, float]:
    """U [2^b, 2^b] and Z_U for s open gates: U_i = g_i I + (1 - g_i) 1, gates in descending order."""
    identity, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    factors = [identity if i < bits else ones for i in range(max_bits)]
    return reduce(torch.kron, factors), float(2 ** (max_bits - bits))


def averaged(levels: Tensor, bits: int) -> Tensor:
    """q^T U / Z_U without repeats: [2^b] positions in any order -> [2^s] ascending. Differentiable."""
    u, z = matrix(bits, (len(levels) - 1).bit_length())
    return (levels.double().sort().values @ u / z)[:: int(z)]


def effective(levels: Tensor, bits: int) -> Tensor:
    """R(q^T U / Z_U): the levels in force, whole numbers of the grid."""
    return averaged(levels, bits).round().clamp(0, 255)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """argmin_j |values_j - x| of each x, in exact arithmetic; the last of several minima."""
    a, b = values.double()[None], x.double().reshape(-1, 1)
    difference = a - b
    part = difference - a
    lost = (a - (difference - part)) + (
        -b - part
    )  # what rounding took from the difference (Knuth's TwoSum)
    lost = lost * difference.sign()
    first = difference.abs() == difference.abs().min(1, keepdim=True).values
    lost = torch.where(first, lost, torch.inf)
    second = lost == lost.min(1, keepdim=True).values
    last = torch.where(second, torch.arange(len(values)), -1).max(1).values
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
    done = [quantize(*group) for group in groups]
    return torch.stack(done, axis) if len(bits) > 1 else done[0]


def edge_cases(scale: float, zero_point: float) -> Tensor:
    """Every point where a decision can lie (the grid's half-steps), one ulp on either side, denormals, and far outside."""
    points = ((torch.arange(-3, 514, dtype=torch.float64) / 2 - zero_point) * scale).float()
    inf = torch.tensor(torch.inf)
    far = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e30, -1e30, 3.4028234e38, -3.4028234e38]
    )
    return flushed(torch.cat([points, points.nextafter(inf), points.nextafter(-inf), far]), scale)


def flushed(x: Tensor, scale: float) -> Tensor:
    """x, with 0 for what is too small for its quotient by a half-step to be a float32."""
    return torch.where(x.double().abs() > scale / 2 * 2.0**-150, x, 0.0)


def all_bits() -> list[tuple[int, int]]:
    """Every (max_bits b, bits s) with 1 <= s <= b <= 8."""
    return [(b, s) for b, s in itertools.product(range(1, 9), repeat=2) if s <= b]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of one dtype agree bit for bit; NaN equals NaN, 0 differs from -0."""
    kind = {4: torch.int32, 2: torch.int16}[found.element_size()]
    return found.shape == expected.shape and torch.equal(
        found.contiguous().view(kind), expected.to(found.dtype).contiguous().view(kind)
    )
