"""The start of a run: compensated only where held-out samples improve."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import RandomBatches, random_data, trainer
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.recipe.schema import Recipe
from ddqcli.training import start
from ddqcli.training.compensate import SAMPLES, Compensation
from ddqcli.training.metrics import Look
from ddqcli.training.trainer import Trainer

PARTS = ((True, True), (False, False))  # means, variances


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "weights": {"max_bits": 3},
            "budget": {"target_bits": 2.5},
            "train": {"distill": {"weight": 1}, **train},
        }
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Shifted(RandomBatches):
    """Batches that have nothing to do with the others."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in super().epoch(epoch, start):
            yield 30 * x.abs() + 100, y


class Labeled:
    """Batches with the float model's classes as labels."""

    def __init__(self, batches: Any, teacher: nn.Module) -> None:
        self.batches, self.teacher, self.samples = batches, teacher, batches.samples

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for x, _ in self.batches.epoch(epoch, start):
            yield x, self.teacher(x).argmax(1)


def begin(settings: Recipe, train: RandomBatches | None = None) -> tuple[Trainer, nn.Module]:
    """A trainer at its start, and the float model. Only the loss decides: scores are all 1."""
    model = network()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    batches = Labeled(RandomBatches(count=4, size=32), teacher)
    data = replace(random_data(), held_out=batches, val=batches, metric=lambda _, y: y >= 0)
    data = replace(data, train=Labeled(train, teacher) if train else batches)
    return trainer(model, settings, 4, data, teacher), teacher


def same_state(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_compensated_start_is_kept_where_it_is_better() -> None:
    plain, compensated = (begin(recipe(compensate=c))[0] for c in (False, True))
    (before,), (after,) = plain.best_state.looks, compensated.best_state.looks
    assert after.held_out_loss < 0.8 * before.held_out_loss
    assert list(compensated.stages) == ["quantized", "compensated"]
    assert compensated.best_state.best is after


def test_a_start_that_harms_is_not_kept() -> None:
    """Training samples that are unlike the others mislead the correction of means and variances."""
    plain, _ = begin(recipe(compensate=False), Shifted(count=4, size=32))
    running, teacher = begin(recipe(compensate=True), Shifted(count=4, size=32))
    assert same_state(running.model, plain.model)
    assert running.best_state.looks == plain.best_state.looks
    assert list(running.stages) == ["quantized"]
    x = torch.cat([x for x, _ in running.data.train.epoch(0)])
    for means, variances in PARTS:  # each of them does harm
        Compensation(plain.quantized, teacher, x).apply(means=means, variances=variances)
        look = plain.held_out.look(plain.model, 0)
        assert look.held_out_loss > running.best_state.looks[0].held_out_loss
        plain.model.load_state_dict(running.model.state_dict())


def test_without_compensation_the_quantized_model_is_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(start, "Compensation")
    running, _ = begin(recipe(compensate=False))
    assert list(running.stages) == ["quantized"]
    without_teacher = trainer(network(), recipe(compensate=True), 4, random_data())
    assert list(without_teacher.stages) == ["quantized"]


def test_the_start_can_be_trained_from() -> None:
    running, _ = begin(recipe())
    assert running.model.training
    assert running.step == 0
    optimized = {id(p) for group in running.weights_optimizer.param_groups for p in group["params"]}
    weights = [t.parameter for t in running.quantized.tensors]
    assert {id(weight) for weight in weights} <= optimized


class KeepsItsLastInput(nn.Module):
    """Has a buffer that takes the shape of the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return self.layers(x)


def test_a_network_may_resize_a_buffer() -> None:
    model = KeepsItsLastInput()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    train, held_out = (RandomBatches(size=size) for size in (48, 32))
    data = replace(random_data(), train=train, held_out=held_out, metric=lambda _, y: y >= 0)
    running = trainer(model, recipe(), 4, data, teacher)
    assert list(running.stages) == ["quantized", "compensated"]


# ---- the choice, by looks that the test makes up

CHOICES = {
    # Looks (loss, accuracy) at the plain start and at the candidates -> the one that is taken.
    "all parts": ([(1.0, 50), (0.5, 50)], 1),
    "weights alone, as all parts lose": ([(1.0, 50), (1.1, 50), (0.8, 60)], 2),
    "weights alone, as accuracy falls": ([(1.0, 50), (0.5, 49), (0.6, 50)], 2),
    "none, as all lose": ([(1.0, 50), (1.1, 60), (1.0, 60)], 0),
    "none, as accuracy falls": ([(1.0, 50), (0.5, 49), (0.6, 49.9)], 0),
    "from a loss that is infinite": ([(float("inf"), 50), (float("inf"), 50), (9, 50)], 2),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_first_candidate_with_lower_loss_and_no_lower_accuracy_is_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, chosen = CHOICES[name]
    running, teacher = begin(recipe(compensate=False))
    marker: Any = running.model.get_submodule("4")
    running.best_state.looks, running.best_state.best, running.best_state.start = [], None, None
    running.recipe = recipe(compensate=True)
    running.held_out.samples = 1_000_000  # so many leave little to chance
    marker.running_mean[0] = 0

    class MarksItsParts:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def error_shares(self) -> dict[str, float]:
            return {"0.weight": 0.5}

        def apply(self, *, means: bool, variances: bool) -> None:
            assert marker.running_mean[0] == 0  # each candidate begins at the plain start
            marker.running_mean[0] = 1 + PARTS.index((means, variances))

    def look(model: nn.Module, step: int) -> Look:
        return Look(step, *looks[int(marker.running_mean[0])])

    monkeypatch.setattr(start, "Compensation", MarksItsParts)
    monkeypatch.setattr(running.held_out, "look", look)
    start.choose_start(running, teacher, lambda: 10.0 * float(marker.running_mean[0]))
    assert int(marker.running_mean[0]) == chosen
    expected = {"quantized": 0.0} | ({"compensated": 10.0 * chosen} if chosen else {})
    assert running.stages == expected
    assert running.best_state.looks == [Look(0, *looks[chosen])]
    assert running.gates.fisher.error_share == ({"0.weight": 0.5} if chosen else {})


def test_bits_are_allocated_by_the_error_that_compensation_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer whose errors compensation removes gets fewer bits; the others get its bytes."""
    running, teacher = begin(recipe(compensate=False))
    layers = {t.name: t.quantizer for t in running.quantized.tensors}
    before = {name: quantizer.bits for name, quantizer in layers.items()}
    monkeypatch.setattr(Compensation, "error_shares", lambda self: {"3.weight": 1e-6})
    monkeypatch.setattr(running.held_out, "look", _improving())
    running.recipe = recipe(compensate=True)
    start.choose_start(running, teacher, lambda: 0.0)
    bits = {name: quantizer.bits for name, quantizer in layers.items()}
    assert bits["3.weight"] < before["3.weight"]
    assert bits["0.weight"] > before["0.weight"]
    assert running.gates.cost() <= running.gates.budget.limit


def test_bits_of_the_plain_start_come_back_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = begin(recipe(compensate=False))
    monkeypatch.setattr(Compensation, "error_shares", lambda self: {"3.weight": 1e-6})
    monkeypatch.setattr(start, "is_better", lambda *_: False)
    running, _ = begin(recipe(compensate=True))
    assert same_state(running.model, plain.model)
    assert [t.quantizer.bits for t in running.quantized.tensors] == [
        t.quantizer.bits for t in plain.quantized.tensors
    ]


@pytest.mark.parametrize(
    ("losses", "accuracies", "compensated"),
    [
        ((1.0, 0.99), (50, 50), True),
        ((1.0, 0.99), (50, 49), False),
        ((1.0, 0.70), (50, 41), True),  # of 25 samples, 20 % and 10 points are chance
        ((1.0, 0.70), (50, 39), False),
        ((1.0, 0.85), (50, 49), False),
    ],
)
def test_a_clearly_lower_loss_outweighs_a_sample_or_two(
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, float],
    accuracies: tuple[float, float],
    compensated: bool,
) -> None:
    running, teacher = begin(recipe(compensate=False))
    plain, other = (Look(0, *each) for each in zip(losses, accuracies, strict=True))
    looks = iter([plain, other, other, plain])
    monkeypatch.setattr(running.held_out, "look", lambda *_: next(looks))
    running.held_out.samples = 25
    running.recipe = recipe(compensate=True)
    start.choose_start(running, teacher, lambda: 0.0)
    assert ("compensated" in running.stages) == compensated


def _improving() -> Any:
    losses = iter((3.0, 2.0, 1.0))
    return lambda model, step: Look(step, next(losses), 50)


# ---- the samples


def samples_of(*shapes: tuple[int, ...]) -> Tensor:
    class OneBuffer(RandomBatches):
        """Fills the same memory again, as some loaders do."""

        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            memory = torch.zeros(max(torch.Size(shape).numel() for shape in shapes))
            for number, shape in enumerate(shapes):
                x = memory[: torch.Size(shape).numel()].view(shape).fill_(number)
                yield x, torch.zeros(shape[0])

    data: Data = replace(random_data(), train=OneBuffer())
    return start._samples(data)


def test_samples_come_from_at_most_twelve_batches() -> None:
    samples = samples_of(*[(8, 3)] * 14)
    assert samples.tolist() == [[float(n)] * 3 for n in range(12) for _ in range(8)]


def test_samples_are_no_more_than_needed() -> None:
    assert samples_of((100, 2), (100, 2), (100, 2)).shape == (SAMPLES, 2)
    assert samples_of((500, 2)).shape == (SAMPLES, 2)


def test_samples_have_one_shape() -> None:
    assert samples_of((8, 3), (8, 4), (4, 3)).shape == (12, 3)
