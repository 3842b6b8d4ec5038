"""Levels, values and shorthands shared by the tests of the method."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ddqcli.quant.fake_quantize import fake_quantize
from ddqcli.quant.lookup import make_lookup_tables
from ddqcli.quant.quantizer import DDQuantizer

few = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
scales = st.builds(lambda m, e: m * 2.0**e, st.integers(2048, 4095), st.integers(-111, 107))
LEVELS = {
    "anywhere": lambda rng, n: torch.rand(n, generator=rng) * 255,
    "beyond the grid": lambda rng, n: torch.randn(n, generator=rng) * 200 + 100,
    "coinciding": lambda rng, n: torch.randint(0, 4, (n,), generator=rng) * 60.0,
    "half steps": lambda rng, n: torch.randint(-4, 514, (n,), generator=rng) / 2,
    "all equal": lambda rng, n: torch.full((n,), 77.0),
}
DISTRIBUTIONS = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "far tails": lambda rng, n: rng.standard_t(2, n),
    "two peaks": lambda rng, n: rng.standard_normal(n) + rng.choice([-3.0, 3.0], n),
    "shifted": lambda rng, n: rng.standard_normal(n) * 0.01 + 1,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def sample(distribution: str, n: int, seed: int = 0) -> np.ndarray:
    return DISTRIBUTIONS[distribution](np.random.default_rng(seed), n).astype(np.float32)


def brute_force_error(x: np.ndarray, levels: np.ndarray) -> float:
    """Sum of squared distances to the nearest level, one level at a time, in float64."""
    nearest = np.full(x.size, np.inf)
    for level in levels:
        nearest = np.minimum(nearest, (x.reshape(-1).astype(np.float64) - level) ** 2)
    return float(nearest.sum())


def quantize(
    x: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, gates: Tensor, bits: tuple, **options
) -> Tensor:
    """fake_quantize, given what its lookup tables are made from."""
    return fake_quantize(x, make_lookup_tables(levels, scale, zero, gates, bits), **options)


def quantize_one(
    x: Tensor, levels: Tensor, bits: int, scale: float, zero: float, **options
) -> Tensor:
    """fake_quantize for one group, levels [2^b]."""
    gates = options.pop("gates", torch.ones(1, (len(levels) - 1).bit_length()))
    grid = torch.tensor([scale]), torch.tensor([float(zero)])
    return quantize(x, levels[None], *grid, gates, (bits,), **options)


def values_in_force(quantizer: DDQuantizer, group: int = 0) -> Tensor:
    levels, scale, zero_point = quantizer.effective_levels()
    return (levels[group] - zero_point[group]) * scale[group]


def squared_error(quantizer: DDQuantizer, x: Tensor) -> float:
    return float((quantizer(x).detach().double() - x.double()).square().sum())
