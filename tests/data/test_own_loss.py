"""A user's own loss: what it may return, and whose fault is whose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ddqcli.data.own_loss import own_loss
from ddqcli.errors import DataError


def output() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


TARGET = torch.tensor([0, 1, 3])


def test_a_loss_is_passed_on_with_its_gradient() -> None:
    loss = own_loss(F.cross_entropy, "data.py:f")
    x = output()
    assert torch.equal(loss(x, TARGET), F.cross_entropy(x, TARGET))
    assert loss(x, TARGET).requires_grad
    with torch.no_grad():
        assert not loss(x, TARGET).requires_grad


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda o, y: torch.zeros(()), "a value without a gradient; compute it from the output"),
        (lambda o, y: F.cross_entropy(o.detach(), y), "a value without a gradient"),
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"shape \[3\]; it must return the "),
        (lambda o, y: 0.0, "a float; it must return the mean loss of the batch as a tensor of one"),
        (lambda o, y: o.nonsense, "failed on .* 'nonsense'; it must return the mean loss"),
    ],
    ids=["constant", "detached", "each sample", "number", "fails"],
)
def test_faults_name_the_loss_of_the_factory(function: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^The loss of data.py:f (returned )?{message}"):
        own_loss(function, "data.py:f")(output(), TARGET)


def test_a_lack_of_memory_is_no_fault_of_the_loss() -> None:
    def loss(output: Any, target: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        own_loss(loss, "data.py:f")(output(), TARGET)


def test_a_distillation_that_fails_is_told_what_it_got() -> None:
    def fails(output: torch.Tensor, float_output: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")

    with pytest.raises(DataError, match=r"distill of data.py:f failed on \(output, float_output\)"):
        own_loss(fails, "data.py:f", "distill")(output(), TARGET)
