"""Looks at held-out samples: what they measure, and which state a run delivers by them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import RandomBatches, random_data
from tiny_training import (
    before_each_step,
    begin,
    differences,
    finish_at_last,
    recipe,
    stored,
)
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.errors import DDQError
from ddqcli.recipe.schema import Recipe
from ddqcli.training.divergence import Diverged
from ddqcli.training.held_out import HeldOut, is_better, is_ruined
from ddqcli.training.metrics import Look
from ddqcli.training.trainer import Trainer

START = Look(0, 2.0, 50.0)


def look(loss: float, accuracy: float, step: int = 1) -> Look:
    return Look(step, loss, accuracy)


# ---- comparisons


@pytest.mark.parametrize(
    ("loss", "accuracy", "better"),
    [
        (0.9, 50, True),
        (0.9, 99, True),
        (1.0, 99, False),  # no lower than the best
        (0.9, 49.9, False),  # less accurate than the start
        (math.inf, 99, False),
        (math.nan, 99, False),
    ],
)
def test_better_is_a_lower_loss_at_the_accuracy_of_the_start(
    loss: float, accuracy: float, better: bool
) -> None:
    best = look(1.0, 70)  # less accurate than the best one is allowed
    assert is_better(look(loss, accuracy), best, START) == better


@pytest.mark.parametrize(
    ("start", "loss", "better"),
    [
        (2.0, 1.79, True),
        (2.0, 1.81, False),
        (-2.0, -2.21, True),
        (-2.0, -2.19, False),
        (math.inf, 9.0, True),
        (0.0, -0.1, True),
    ],
)
def test_a_gain_must_exceed_chance(start: float, loss: float, better: bool) -> None:
    first = Look(0, start, 50.0)
    assert is_better(look(loss, 50), first, first, least_gain=0.1) == better


@pytest.mark.parametrize(
    ("loss", "accuracy", "ruined"),
    [
        (8.1, 44.9, True),
        (8.0, 44.9, False),  # not more than 4 times the loss
        (8.1, 45.0, False),  # not more than 5 points lost
        (1.0, 0.0, False),
        (1e9, 50.0, False),
        (math.inf, 99.0, True),
        (math.nan, 99.0, True),
    ],
)
def test_ruined_is_4_times_the_loss_and_5_points_less(
    loss: float, accuracy: float, ruined: bool
) -> None:
    assert is_ruined(look(loss, accuracy), START) == ruined


def test_a_negative_loss_is_ruined_by_a_rise_of_3_times_its_size() -> None:
    start = Look(0, -2.0, 50.0)
    assert not is_ruined(look(-2.0, 40), start)
    assert not is_ruined(look(4.0, 40), start)
    assert is_ruined(look(4.1, 40), start)


# ---- what a look measures


class Uneven(RandomBatches):
    """Batches of 8, 3, 0 and 1 samples."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for (x, y), size in zip(super().epoch(epoch, start), (8, 3, 0, 1), strict=True):
            yield x[:size], y[:size]


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 10), nn.Dropout(0.5))


def held_out_data(**functions: Any) -> Data:
    return replace(random_data(), held_out=Uneven(), train=None, val=None, **functions)


def distill(weight: float) -> Recipe:
    return Recipe.model_validate({"train": {"distill": {"weight": weight, "temperature": 2}}})


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_look_is_the_mean_training_loss_and_score_over_all_samples(weight: float) -> None:
    """Against float64 formulas on all samples at once."""
    data, model, teacher = held_out_data(), linear(0), linear(1).eval()
    seen = HeldOut(data, teacher, distill(weight)).look(model, 7)
    x, y = (torch.cat(part) for part in zip(*Uneven().epoch(0), strict=True))
    with torch.no_grad():
        output, target = (copy.deepcopy(m).double()(x.double()) for m in (model, teacher))
    labels = -output.log_softmax(1)[torch.arange(12), y].mean()
    p, q = (target / 2).softmax(1), (output / 2).softmax(1)
    divergence = 4 * (p * (p / q).log()).sum(1).mean()
    expected = weight * divergence + (1 - weight) * labels
    assert seen.step == 7
    assert seen.held_out_loss == pytest.approx(float(expected), rel=1e-5)
    assert seen.held_out_accuracy == pytest.approx(100 * float((output.argmax(1) == y).sum()) / 12)


def test_without_the_float_model_a_look_judges_by_labels() -> None:
    data, model = held_out_data(), linear(0)
    with_labels = HeldOut(data, linear(1).eval(), distill(0)).look(model, 0)
    assert HeldOut(data, None, distill(1)).look(model, 0) == with_labels


def test_a_look_changes_nothing() -> None:
    class ChangesItsInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.mul_(2))

    batches = list(Uneven().epoch(0))
    before = copy.deepcopy(batches)
    held_out = Uneven()
    held_out.epoch = lambda epoch, start=0: iter(batches)  # type: ignore[method-assign]
    model = ChangesItsInput().train()
    state = copy.deepcopy(model.state_dict())
    looks = HeldOut(replace(held_out_data(), held_out=held_out), model, distill(0.5))
    assert looks.look(model, 0) == looks.look(model, 0)
    assert not model.training
    assert not differences(model.state_dict(), state)
    assert not differences(batches, before)


def test_a_loss_that_is_not_a_number_counts_as_infinite() -> None:
    data = held_out_data(loss=lambda output, y: output.mean() * math.nan)
    assert HeldOut(data, None, distill(0)).look(linear(0), 0).held_out_loss == math.inf


# ---- the state that a run delivers


def run(running: Trainer) -> dict[int, dict[str, Tensor]]:
    """Run to the end; return the states at the looks by step."""
    states = {running.step: copy.deepcopy(running.model.state_dict())}
    running.run(
        lambda metrics: None,
        lambda look: states.update({look.step: copy.deepcopy(running.model.state_dict())}),
        lambda: None,
    )
    return states


def make_up_looks(running: Trainer, looks: dict[int, tuple[float, float]]) -> None:
    """Let the trainer see these losses and accuracies, by step, instead of the real ones."""
    running.best_state.looks, running.best_state.best, running.best_state.start = [], None, None
    running.held_out.look = lambda model, step: Look(step, *looks[step])  # type: ignore[method-assign]
    running.look()


CURVES = {
    # (loss, accuracy) at steps 0, 1, 2, ... -> step of the state that is delivered
    "improves": ([(5, 50), (4, 51), (3, 52), (2, 53), (1, 54)], 4),
    "gets worse": ([(1, 50), (2, 49), (3, 48), (4, 47), (5, 46)], 0),
    "gets worse later": ([(5, 50), (4, 50), (3, 52), (4, 60), (5, 46)], 2),
    "loses accuracy": ([(5, 50), (4, 55), (3, 49), (2, 48), (1, 49.5)], 1),
    "stays": ([(5, 50), (5, 50), (5, 50), (5, 50), (5, 50)], 0),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_run_delivers_the_best_state_it_has_seen(name: str) -> None:
    curve, best_step = CURVES[name]
    running = begin(recipe(gates={"rule": "fixed"}), steps=4)
    make_up_looks(running, dict(enumerate(curve)))
    states = run(running)
    assert [seen.step for seen in running.best_state.looks] == [0, 1, 2, 3, 4]
    assert running.best_state.best == Look(best_step, *curve[best_step])
    assert not differences(running.model.state_dict(), states[best_step])
    assert not running.model.training
    assert differences(states[best_step], states[(best_step + 1) % 5])  # steps do differ


def test_a_run_that_harms_delivers_its_start() -> None:
    running = begin(recipe(train={"lr": 0.7, "distill": {"weight": 1}}), steps=8)
    states = run(running)
    first, last = running.best_state.looks[0], running.best_state.looks[-1]
    assert last.held_out_loss > first.held_out_loss
    assert running.best_state.best is not None
    assert not differences(running.model.state_dict(), states[running.best_state.best.step])
    delivered = running.held_out.look(running.model, 0)
    assert delivered.held_out_loss == running.best_state.best.held_out_loss <= first.held_out_loss
    assert delivered.held_out_accuracy >= first.held_out_accuracy


def test_the_best_state_fits_the_budget() -> None:
    """The budget falls from 8 to 3 bits, and every state that exceeds it would be better."""
    settings = recipe(gates={"descent": 0.5, "looks": 8})
    running = begin(settings, steps=16)
    limit = running.gates.budget.limit
    assert limit is not None
    assert running.gates.cost() > limit
    costs: dict[int, float] = {}

    def seen(model: nn.Module, step: int) -> Look:
        costs[step] = running.gates.cost()
        return Look(step, 1.0 + step, 50.0)

    running.best_state.looks, running.best_state.best, running.best_state.start = [], None, None
    running.held_out.look = seen  # type: ignore[method-assign]
    running.look()
    assert running.best_state.best is None
    assert not running.restore_best()
    run(running)
    first_that_fits = min(step for step, cost in costs.items() if cost <= limit)
    assert 0 < first_that_fits < 16
    assert running.best_state.best == Look(first_that_fits, 1.0 + first_that_fits, 50.0)
    assert running.gates.cost() == costs[first_that_fits]
    running.gates.check_kept()


def test_bits_return_to_those_of_the_best_state() -> None:
    running = begin(recipe(gates={"rule": "fixed"}), steps=4)
    make_up_looks(running, {step: (1 + step, 50) for step in range(5)})
    bits = [t.quantizer.bits for t in running.quantized.tensors]
    for tensor in running.quantized.tensors[:2]:
        tensor.quantizer.fit(tensor.parameter, 1)
    running.step = 3
    running.look()
    assert running.restore_best()
    assert [t.quantizer.bits for t in running.quantized.tensors] == bits


@pytest.mark.parametrize("loss", [9.0, math.inf])
def test_sampled_bits_raise_the_loss_without_a_divergence(loss: float) -> None:
    running = begin(recipe(method="sdq"))
    running.best_state.start = look(1.0, 50, step=0)
    running.step = 3
    running.held_out.look = lambda model, step: look(loss, 10, step)  # type: ignore[method-assign]
    if math.isfinite(loss):
        running.look()
        running.gates.before_step(running.gates.frozen_from)  # from here on, bits are fixed
    with pytest.raises(Diverged, match="The held-out loss went from"):
        running.look()


def test_a_ruined_state_ends_the_run_and_training_restarts_from_the_best() -> None:
    running = begin(recipe(gates={"rule": "fixed"}), steps=4)
    looks = {0: (2.0, 50.0), 1: (1.0, 50.0), 2: (9.0, 10.0)}
    make_up_looks(running, looks)
    states: dict[int, Any] = {}
    with pytest.raises(Diverged, match="held-out loss went from 2 to 9 at step 2 of 4"):
        running.run(
            lambda metrics: None,
            lambda look: states.update({look.step: copy.deepcopy(running.model.state_dict())}),
            lambda: None,
        )
    assert running.restart_from_best(0.1)
    assert (running.step, running.lr_scale) == (1, 0.1)
    assert [seen.step for seen in running.best_state.looks] == [0, 1]
    assert not differences(running.model.state_dict(), states[1])
    assert issubclass(Diverged, DDQError)


# ---- small steps that do harm


def begin_adamw(looks: dict[int, tuple[float, float]], **train: Any) -> Trainer:
    train = {"optimizer": "adamw", "lr": 1e-3, **train}
    running = begin(recipe(gates={"rule": "fixed"}, train=train), steps=8)
    make_up_looks(running, looks)
    return running


def levels_lr(running: Trainer) -> float:
    assert running.levels_optimizer
    return float(running.levels_optimizer.param_groups[0]["initial_lr"])


def test_a_look_above_the_first_one_settles_the_weights_on_the_levels_of_the_best_state() -> None:
    running = begin_adamw(dict(enumerate([(5, 50), (4, 50), (6, 50), (5.5, 50)])))
    before, settled_at = levels_lr(running), {}
    best: dict[str, Tensor] = {}

    def seen(look: Look) -> None:
        settled_at[look.step] = running.settled
        if look.step == 1:
            best.update(copy.deepcopy(running.model.state_dict()))
        if look.step == 2:
            assert running.model.training
            assert levels_lr(running) == pytest.approx(0.1 * before)
            quantized = best | {
                name: value
                for name, value in running.model.state_dict().items()
                if name.endswith("original")
            }
            assert not differences(running.model.state_dict(), quantized)
            for tensor in running.quantized.tensors:
                assert torch.equal(tensor.quantizer(tensor.parameter), tensor.parameter)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        running.run(lambda metrics: None, seen, lambda: None)
    assert settled_at == {1: False, 2: True}
    assert running.step == 2  # no step is repeated
    running.step = 3
    running.look()  # above the first one again, and not ruined
    assert running.best_state.best == Look(1, 4, 50)


def test_a_run_settles_once_and_then_may_diverge() -> None:
    running = begin_adamw({0: (1, 50), 1: (99, 10), 2: (99, 10)})
    running.step = 1
    running.look()
    assert running.settled
    running.step = 2
    with pytest.raises(Diverged):
        running.look()
    assert running.restart_from_best(0.1)
    assert levels_lr(running) == pytest.approx(0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sgd_and_improving_runs_do_not_settle(optimizer: str) -> None:
    loss = 9 if optimizer == "sgd" else 0.9
    running = begin_adamw({0: (1, 50), 1: (loss, 50)}, optimizer=optimizer)
    running.step = 1
    running.look()
    assert not running.settled


def test_a_settled_run_resumes_to_the_same_bytes() -> None:
    looks = {0: (5, 50)} | {step: (6 - step / 10, 50) for step in range(1, 9)}
    states = []
    for stop in (None, 4):
        running = begin_adamw(looks)
        if stop:

            def halt(step: int, stop: int = stop) -> None:
                if step == stop:
                    raise InterruptedError

            before_each_step(running, halt)
            with pytest.raises(InterruptedError):
                finish_at_last(running)
            saved = stored(running.state())
            running = begin_adamw(looks)
            running.load(saved)
            assert running.settled
        finish_at_last(running)
        states.append(running.state())
    assert not differences(*states)
