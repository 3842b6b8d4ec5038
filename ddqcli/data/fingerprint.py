"""Fingerprints of tensors and data: a resumed run must see the data that it was begun with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ddqcli.data.trees import Tree, tensors

_SAMPLES = 16  # that stand for all samples


def sha256_of_tensors(values: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the tensors' shapes and values."""
    digest = hashlib.sha256()
    for tensor in values:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(tree: Tree) -> str:
    """Return a hash of all integers in a tree of tensors [N, ...], and of a few samples of floats.

    Floats are rounded to about a percent: the last bits of computed data may depend on the number
    of threads.
    """
    return sha256_of_tensors(map(_coarse, tensors(tree)))


def repeatable_fingerprint(batches: Iterable[Tree]) -> str:
    """Return the fingerprint of one batch that is read twice; "" if the two readings differ."""
    first, second = map(fingerprint, batches)
    return first if first == second else ""


def spread_indices(samples: int) -> list[int]:
    """Return a few indices, spread evenly over 0..samples-1."""
    indices: list[int] = torch.linspace(0, samples - 1, min(_SAMPLES, samples)).long().tolist()
    return indices


def _coarse(values: Tensor) -> Tensor:
    """Return integers as they are; of floats, the rounded mean and deviation of a few samples."""
    if not values.is_floating_point() or not values.numel():
        return values
    rows = values.reshape(len(values) if values.ndim else 1, -1)
    flat = rows[spread_indices(len(rows))].detach().double()
    mean, deviation = flat.mean(1), flat.std(1, correction=0)
    scale = torch.maximum(mean.abs(), deviation).clamp_min(1e-30)
    percent = torch.stack([100 * mean / scale, 100 * deviation / scale, 100 * scale.log()])
    return percent.round().long()
