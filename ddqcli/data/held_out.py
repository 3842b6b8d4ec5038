"""Choose the training samples that are held out of training, to judge its states by."""

from __future__ import annotations

import torch
from torch import Tensor

from ddqcli.data.seeding import generator

_MOST = 512  # samples
_FRACTION = 8  # at most one sample in this many


def held_out_size(samples: int) -> int:
    """Return how many of `samples` training samples are held out; 0 of fewer than 8."""
    return min(_MOST, samples // _FRACTION)


def split_held_out(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sorted indices of the samples to train on, and of those held out.

    Held-out samples are drawn at random: data are often sorted by class. Of fewer than 8 samples
    none can be spared, and all of them are in both parts.
    """
    size = held_out_size(samples)
    if size == 0:
        return torch.arange(samples), torch.arange(samples)
    indices = torch.randperm(samples, generator=generator("held-out", seed))
    return indices[size:].sort().values, indices[:size].sort().values
