"""Seeded code repeats, and leaves the global generators as they were."""

from __future__ import annotations

import random

import numpy as np
import torch

from ddqcli.data.seeding import seeded


def test_seeded_repeats_inside_and_changes_nothing_outside():
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with seeded("a", 1):
        first = draws()
    with seeded("a", 1):
        again = draws()
    with seeded("a", 2):
        other = draws()
    assert first == again
    assert not set(first) & set(other)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
