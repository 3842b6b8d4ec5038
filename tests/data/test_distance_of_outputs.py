"""Outputs are compared sample by sample: equal ones differ by 0, whatever they hold."""

from __future__ import annotations

import math

import pytest
import torch

from ddqcli.data.distance import sample_differences

NAN, INF = math.nan, math.inf


def test_the_difference_is_the_relative_error_by_definition() -> None:
    actual, expected = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scale = math.sqrt(sum(float(v) ** 2 for v in expected.flatten()) / 12)
    by_hand = [
        math.sqrt(sum((float(a) - float(e)) ** 2 for a, e in zip(x, y, strict=True)) / 4) / scale
        for x, y in zip(actual, expected, strict=True)
    ]
    assert sample_differences(actual, expected).tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([NAN, 1.0], [NAN, 1.0], 0),
        ([INF, 1.0], [INF, 1.0], 0),
        ([NAN, 1.0], [2.0, 1.0], INF),
        ([2.0, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([1.0, 0.0], [0.0, 0.0], INF),
    ],
)
def test_equal_samples_never_differ_and_others_do(
    actual: list[float], expected: list[float], difference: float
) -> None:
    found = sample_differences(torch.tensor([actual]), torch.tensor([expected]))
    assert found.tolist() == [difference]
