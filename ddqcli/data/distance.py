"""The distance of a network's outputs from those of the float network."""

from __future__ import annotations

import torch
from torch import Tensor

from ddqcli.data.trees import Tree, shared_length, tensors
from ddqcli.runs.evaluation import Metric

DISTANCE = Metric(name="distance from the float outputs", better="lower")  # judges without labels


def sample_differences(actual: Tree, expected: Tree) -> Tensor:
    """Return each sample's relative error [B], the largest of a tree's tensors.

    It is the root mean square of the sample's difference over the root mean square of all expected
    values; 0 for equal samples, also of NaN or of zeros alone; infinite for any other NaN, and
    where the trees differ in shape. Tensors that differ in their first dimension count as one
    sample.
    """
    pairs = list(zip(tensors(actual), tensors(expected), strict=False))
    same_number = len(pairs) == len(tensors(actual)) == len(tensors(expected))
    if not same_number or any(a.shape != e.shape for a, e in pairs):
        return torch.tensor([torch.inf], dtype=torch.float64)
    samples = shared_length(expected) or 1
    return torch.stack([_relative_error(a, e, samples) for a, e in pairs]).amax(0)


def _relative_error(actual: Tensor, expected: Tensor, samples: int) -> Tensor:
    """Return the relative error [B] of one tensor; a number is one of all samples."""
    if expected.ndim == 0:
        actual, expected = actual.expand(samples), expected.expand(samples)
    actual, expected = (x.double().reshape(samples, -1) for x in (actual, expected))
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    relative = (actual - expected).square().mean(1).sqrt() / expected.square().mean().sqrt()
    return torch.where(same.all(1), 0.0, relative.nan_to_num(nan=torch.inf, posinf=torch.inf))
