"""Distillation: its loss against float64, its targets, and outputs it is refused for."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from small_models import random_data, trainer
from tiny_training import STEPS, finish, network, recipe
from torch import Tensor, nn

from ddqcli.data.augment import Preprocess
from ddqcli.data.load import Data
from ddqcli.errors import DataError
from ddqcli.training.distillation import check_distillable, distillation


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (None, "no tensor"),
        (torch.zeros(4, 1), r"of shape \[4, 1\]"),
        (torch.zeros(4, 3, 2, 2), "of shape"),
        (torch.tensor([[0.0, -math.inf]]), "partly infinite"),
    ],
)
def test_outputs_that_cannot_be_distilled_are_refused(output: Tensor | None, problem: str) -> None:
    check_distillable({"output": torch.zeros(4, 2)})
    with pytest.raises(DataError, match=f"output is {problem}.*; set train.distill.weight=0"):
        check_distillable(None if output is None else {"output": output})


def test_the_loss_is_that_of_hinton_et_al_beside_the_labels() -> None:
    """Against float64 sums. By default 0.9 at temperature 4, and 0 where the loss is the user's."""
    x, y = next(random_data().train.epoch(0))
    own = dataclasses.replace(random_data(), own_loss=True)
    teacher = network(1).eval().requires_grad_(False)
    for settings, data, share, temperature in [
        ({}, random_data(), 0.9, 4.0),
        ({}, own, 0.0, 4.0),
        ({"weight": 0.3, "temperature": 2.0}, own, 0.3, 2.0),
    ]:
        running = trainer(network(), recipe(train={"distill": settings}), 5, data, teacher)
        output = torch.randn(len(y), 10, generator=torch.Generator().manual_seed(3))
        goal = (teacher(x).double() / temperature).softmax(1)
        log_output = (output.double() / temperature).log_softmax(1)
        divergence = (goal * (goal.log() - log_output)).sum() / len(y)
        labels = -output.double().log_softmax(1)[torch.arange(len(y)), y].mean()
        expected = share * temperature**2 * divergence + (1 - share) * labels
        loss = running._loss(output, y, running._target(x))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_is_exact_under_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (5 * torch.randn(64, 10, generator=generator)).bfloat16()
    output = (target + 0.2 * torch.randn(64, 10, generator=generator)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation(output, target, 4.0)
    loss.backward()
    exact = output.detach().double().requires_grad_()
    goal = (target.double() / 4).softmax(1)
    expected = 16 * (goal * (goal.log() - (exact / 4).log_softmax(1))).sum() / 64
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert output.grad is not None
    assert exact.grad is not None
    assert (output.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


def with_flips(flip: bool) -> Data:
    augment = Preprocess([0.5] * 3, [0.5] * 3, torch.device("cpu"), flip=flip)
    return dataclasses.replace(random_data(), augment=augment)


@pytest.mark.parametrize("flip", [True, False], ids=["flipped at random", "not flipped"])
def test_where_training_flips_images_an_image_and_its_flip_share_one_target(flip: bool) -> None:
    teacher = network(1).eval().requires_grad_(False)
    settings = recipe(train={"distill": {}})
    running = trainer(network(), settings, 5, with_flips(flip), teacher)
    x, _ = next(random_data().train.epoch(0))
    target, target_of_flip = running._target(x), running._target(x[:, :, :, [5, 4, 3, 2, 1, 0]])
    alone = teacher(x)
    assert target is not None
    assert target_of_flip is not None
    assert torch.allclose(target, target_of_flip, atol=1e-5) == flip
    assert torch.allclose(target, alone, atol=1e-5) != flip
    assert torch.allclose(target + target, alone + teacher(x.flip(3)), atol=1e-5) == flip


@pytest.mark.parametrize("flip", [True, False], ids=["flipped at random", "not flipped"])
def test_the_float_model_sees_the_input_that_a_network_changes_in_place(flip: bool) -> None:
    class Normalizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.sub_(0.5).div_(0.2))  # type: ignore[no-any-return]

    teacher = Normalizing().eval().requires_grad_(False)
    settings = recipe(train={"distill": {"weight": 1}})
    running = trainer(Normalizing(), settings, 2, with_flips(flip), teacher)
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    finish(running)
    batches = itertools.islice(random_data().train.epoch(0), 2)
    given = [view for x, _ in batches for view in ((x, x.flip(3)) if flip else (x,))]
    assert [torch.equal(x, y) for x, y in zip(seen, given, strict=True)] == [True] * len(given)


def test_full_distillation_needs_no_labels() -> None:
    def no_loss(output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("the labels were used")

    data = dataclasses.replace(random_data(), loss=no_loss)
    teacher = network().eval().requires_grad_(False)
    settings = recipe(train={"distill": {"weight": 1.0}})
    running = trainer(network(), settings, STEPS, data, teacher)
    assert finish(running)[-1].step == STEPS
