"""A file keeps the network's order of tensors in a few numbers, and none for the usual order."""

from __future__ import annotations

import random

import pytest
from torchvision import models

from ddqcli.runs.layer_order import in_order, order_runs, usual_order


@pytest.mark.parametrize("seed", range(20))
def test_any_order_is_restored(seed: int) -> None:
    names = [f"layer{k}.{part}" for k in range(seed) for part in ("weight", "bias")]
    random.Random(seed).shuffle(names)
    assert in_order(set(names), order_runs(names)) == names


def test_the_usual_order_takes_no_numbers() -> None:
    names = [f"block{k}.{part}" for k in range(12) for part in ("weight", "bias")]
    assert usual_order(set(names)) == names
    assert order_runs(names) == []
    assert order_runs([]) == []
    assert in_order(set(), []) == []


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16", "densenet121"])
def test_the_order_of_common_networks_is_short(name: str) -> None:
    parameters = getattr(models, name)().named_parameters()
    names = [name for name, value in parameters if value.ndim > 1]  # what is quantized
    runs = order_runs(names)
    assert in_order(set(names), runs) == names
    assert len(runs) <= 1.1 * len(names)


@pytest.mark.parametrize(
    "runs", [[0, 1], [0, 4], [0, 2, 1, 1], [2, 2, 0, 1], [-1, 3], [0, 10**12], [3, -1, 0, 4], [0]]
)
def test_numbers_that_are_no_order_are_refused(runs: list[int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        in_order(["a", "b", "c"], runs)
