"""Random numbers that depend on a key alone, such as (seed, epoch, step)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key_seed(*key: str | int) -> int:
    """A seed in 0..2**32-1 (torch's CPU generator uses no more bits), unrelated for unequal keys."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded from `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


@contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Seed the global CPU generators of torch, numpy and random from `key` inside; leave them untouched outside."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = key_seed(*key)
    torch.default_generator.manual_seed(
        seed
    )  # torch.manual_seed would reseed the accelerator as well
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
