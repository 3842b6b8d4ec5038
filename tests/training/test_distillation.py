"""Distillation: its loss against float64, its targets, and outputs it is refused for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

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
        (None, "no floating-point tensor"),
        ({"classes": torch.arange(4)}, "no floating-point tensor"),
        (torch.tensor([[0.0, -math.inf]]), "partly infinite"),
        ({"a": torch.zeros(4, 2), "b": torch.tensor([math.nan])}, "partly infinite"),
    ],
)
def test_outputs_that_cannot_be_distilled_are_refused(output: Any, problem: str) -> None:
    for fine in (torch.zeros(4, 2), torch.zeros(4), {"a": torch.zeros(4, 3, 2, 2), "b": None}):
        check_distillable(fine)
    with pytest.raises(DataError, match=f"output is {problem}.*; set train.distill.weight=0"):
        check_distillable(output)


def test_outputs_that_differ_in_training_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[\[2, 3\], \[2\]\], differ in shape .* \[\[2, 3\]\]"):
        distillation((torch.zeros(2, 3), torch.zeros(2)), torch.zeros(2, 3), 4.0)


def kl(target: Tensor, output: Tensor, axis: int, temperature: float = 4.0) -> float:
    """Return T^2 * KL in float64, mean over all places but `axis`."""
    p, q = ((x.double() / temperature).softmax(axis) for x in (target, output))
    return temperature**2 * float((p * (p / q).log()).sum(axis).mean())


def squared_error(target: Tensor, output: Tensor) -> float:
    """Return the mean squared error over the target's variance, in float64."""
    t, o = target.double(), output.double()
    return float(((o - t) ** 2).mean() / ((t - t.mean()) ** 2).mean())


CLASSES = torch.randint(5, (3, 4, 4), generator=torch.Generator().manual_seed(1))
RULES: dict[str, tuple[tuple[int, ...], Any, int | None]] = {
    # shape of an output, targets -> axis of its class scores
    "scores without labels": ((3, 5), None, 1),
    "scores and classes": ((3, 5), torch.zeros(3).long(), 1),
    "values beside targets of their shape": ((3, 5), torch.zeros(3, 5), None),
    "one value": ((3, 1), torch.zeros(3, 1), None),
    "a value for each sample": ((3,), torch.zeros(3), None),
    "segmentation": ((3, 5, 4, 4), CLASSES, 1),
    "segmentation without labels": ((3, 5, 4, 4), None, None),
    "depth beside classes": ((3, 1, 4, 4), CLASSES, None),
    "language model": ((3, 6, 5), {"next": CLASSES[:, :, 0].repeat(1, 2)[:, :6]}, 2),
    "image": ((3, 3, 4, 4), torch.zeros(3, 3, 4, 4), None),
}


@pytest.mark.parametrize("name", RULES)
def test_class_scores_are_distilled_along_their_axis_and_values_by_squared_error(name: str) -> None:
    shape, labels, axis = RULES[name]
    generator = torch.Generator().manual_seed(0)
    target = 3 * torch.randn(shape, generator=generator) + 1
    output = target + 0.3 * torch.randn(shape, generator=generator)
    expected = squared_error(target, output) if axis is None else kl(target, output, axis)
    assert distillation(output, target, 4.0, labels).item() == pytest.approx(expected, rel=1e-4)
    assert distillation(target, target, 4.0, labels).item() == pytest.approx(0, abs=1e-5)


def test_the_losses_of_all_tensors_of_an_output_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((4, 3), (4, 1), (4, 3)))
    output, target = (
        {"class": a, "size": b, "index": CLASSES},
        {"class": c, "size": 2 * b, "index": CLASSES},
    )
    labels = {"class": torch.zeros(4).long(), "size": torch.zeros(4)}
    expected = kl(c, a, 1) + squared_error(2 * b, b)
    assert distillation(output, target, 4.0, labels).item() == pytest.approx(expected, rel=1e-4)


def test_a_constant_output_is_distilled_in_units_of_its_size() -> None:
    loss = distillation(torch.full((4,), 3.0), torch.full((4,), 2.0), 4.0)
    assert loss.item() == pytest.approx(0.25)


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
        loss = running.forward.loss(output, y, running.forward.target(x))
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
    forward = running.forward
    target, target_of_flip = forward.target(x), forward.target(x[:, :, :, [5, 4, 3, 2, 1, 0]])
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
