"""Snapshots: their numbers against brute force, that they are few, and that they change nothing."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from small_models import random_data, small, trainer
from torch import nn

from ddqcli.recipe.schema import Recipe
from ddqcli.training.metrics import REPORT_EVERY
from ddqcli.training.snapshot import is_snapshot_step, relative_error, snapshot
from ddqcli.training.trainer import Trainer

STEPS = 10


def begin(**weights: object) -> Trainer:
    torch.manual_seed(0)
    sections = {
        "budget": {"target_bits": 5},
        "data": {"batch_size": 8},
        "weights": weights,
        "activations": {"bits": 4},
    }
    network = nn.Sequential(
        *small()[:2], nn.AdaptiveAvgPool2d(2), *small()[2:4], nn.Dropout(0.5), nn.Linear(16, 10)
    )
    return trainer(network, Recipe.model_validate(sections), STEPS, random_data(count=6))


def test_errors_and_levels_are_those_of_brute_force() -> None:
    running = begin()
    running.run(lambda metrics: None, lambda look: None, lambda: None)
    taken = snapshot(running.quantized, STEPS)
    assert taken.step == STEPS
    assert set(taken.error) == {t.name for t in running.quantized.tensors}
    for tensor in running.quantized.tensors:
        x = tensor.parameter.detach().double().reshape(-1)
        q = tensor.quantizer(tensor.parameter).detach().double().reshape(-1)
        difference = sum((a - b) ** 2 for a, b in zip(q.tolist(), x.tolist(), strict=True))
        exact = difference / sum(v**2 for v in x.tolist())
        assert taken.error[tensor.name] == pytest.approx(exact, rel=1e-5)
        bits = tensor.quantizer.bits[0]
        assert (tensor.name in taken.levels) == (bits < 8)
        if bits < 8:
            levels = taken.levels[tensor.name]
            assert len(levels) == 2**bits
            assert levels == sorted(levels)
            assert all(min(abs(v - level) for level in levels) < 1e-5 for v in q.tolist())


def test_levels_by_channel_are_left_out() -> None:
    taken = snapshot(begin(granularity="channel", max_bits=4, bias_bits=None).quantized, 0)
    assert len(taken.error) == 4
    assert taken.levels == {}


def test_the_error_of_a_tensor_of_zeros_is_finite_and_zero_after_a_refit() -> None:
    tensor = begin().quantized.tensors[0]
    tensor.parameter.data.zero_()
    energy = float(tensor.quantizer(tensor.parameter).detach().double().square().sum())
    assert relative_error(tensor) == pytest.approx(energy, rel=1e-5)
    tensor.quantizer.fit(tensor.parameter, 4)
    assert relative_error(tensor) == 0


def test_snapshots_change_nothing() -> None:
    states = []
    for takes_snapshots in (False, True):
        running = begin()

        def hook(*_: object, running: Trainer = running, takes: bool = takes_snapshots) -> None:
            if takes:
                snapshot(running.quantized, running.step)

        hook()
        running.run(hook, hook, hook)
        states.append((copy.deepcopy(running.state()), torch.get_rng_state()))
    (one, random_one), (other, random_other) = states
    assert torch.equal(random_one, random_other)
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert one["gates"] == other["gates"]


@pytest.mark.parametrize("steps", [1, 9, 10, 250, 400, 1000, 12_345, 10**6])
def test_a_run_has_about_forty_snapshots_evenly_spread(steps: int) -> None:
    reported = [*range(REPORT_EVERY, steps + 1, REPORT_EVERY)]
    due = [step for step in reported if is_snapshot_step(step, steps, REPORT_EVERY)]
    assert len(due) == len(reported) if steps <= 400 else 35 <= len(due) <= 42
    gaps = [b - a for a, b in pairwise(due)]
    assert not gaps or max(gaps) <= min(gaps) + REPORT_EVERY
