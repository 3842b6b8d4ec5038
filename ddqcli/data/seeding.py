"""Random numbers that depend on a key alone, such as ("order", seed, epoch).

Results then depend neither on how many processes read the data, nor on what ran before, nor on
where a run was resumed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key_seed(*key: str | int) -> int:
    """Return a seed in 0..2**32-1 that is unrelated for unequal keys.

    PyTorch's CPU generator uses no more than 32 bits.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator seeded from `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


@contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Seed the global CPU generators of torch, numpy and random from `key`; restore them after."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = key_seed(*key)
    # torch.manual_seed would also reseed the accelerator.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
