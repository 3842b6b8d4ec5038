"""SDQ's rule: its pairs of bit-widths, the expected cost on its schedule, and the freeze."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from rule_runs import (
    assert_budget_kept,
    bits_in_force,
    expected_cost,
    few_looks,
    network,
    rule_of,
    rule_recipe,
)
from small_models import trainer
from torch import nn

from ddqcli.qat.rules.sdq import SDQRule
from ddqcli.training.trainer import Trainer

STEPS = 60


def begin(steps: int = STEPS, model: nn.Module | None = None, **sections: Any) -> Trainer:
    sections = {"budget": {"target_bits": 3}, **sections}
    recipe = rule_recipe("sdq", sections.pop("budget"), **sections)
    return trainer(model or network(), recipe, steps, few_looks())


def rule_in(running: Trainer) -> SDQRule:
    assert isinstance(running.gates, SDQRule)
    return running.gates


def mean_cost(rule: SDQRule) -> float:
    """The mean over all draws: the cost at the bits in force, and what each pair adds to it."""
    now = {t.name: t.quantizer.bits[0] for t in rule.model.tensors}
    total = float(expected_cost(rule.model, now))
    for name, dbp in rule.dbps.items():
        larger, smaller = (
            expected_cost(rule.model, {**now, name: s}) for s in (dbp.larger, dbp.smaller)
        )
        p = 1 / (1 + math.exp(-dbp.z))
        total += p * larger + (1 - p) * smaller - expected_cost(rule.model, now)
    return total


def run_with(running: Trainer, each_step: Any) -> None:
    """Run to the end; call `each_step` with the number of each step after its DBPs have moved."""
    after_backward = running.gates.after_backward

    def watched(step: int, loss: float) -> None:
        after_backward(step, loss)
        each_step(step)

    running.gates.after_backward = watched  # type: ignore[method-assign]
    running.restore_best = lambda: True  # type: ignore[method-assign]
    running.run(lambda metrics: None, lambda look: None, lambda: None)


def test_the_start_fits_the_budget_and_the_expected_cost_lies_above_it() -> None:
    rule = rule_in(begin())
    assert_budget_kept(rule.model, rule.budget.limit)
    assert rule.expected_cost() == pytest.approx(mean_cost(rule))
    assert mean_cost(rule) > 1.05 * (rule.budget.limit or 0)
    for tensor in rule.model.tensors:
        if tensor.fixed:
            assert tensor.name not in rule.dbps
        else:
            dbp, now = rule.dbps[tensor.name], tensor.quantizer.bits[0]
            at_most = now == tensor.max_bits
            assert now == (dbp.larger if at_most else dbp.smaller)
            assert dbp.probability == pytest.approx(0.9 if at_most else 0.5, abs=0.01)


@pytest.mark.parametrize("levels", ["learned", "uniform"])
def test_the_expected_cost_follows_the_schedule_down_to_the_budget(levels: str) -> None:
    running = begin(weights={"levels": levels})
    rule = rule_in(running)
    budget, first = rule.budget.limit or 0, mean_cost(rule)
    off = []

    def compare(step: int) -> None:
        if step < rule.frozen_from:
            schedule = budget + (first - budget) * (1 - (step + 1) / 30)
            off.append(abs(mean_cost(rule) - schedule) / schedule)

    run_with(running, compare)
    assert len(off) == 30
    assert max(off) < 1e-6
    assert_budget_kept(rule.model, rule.budget.limit)


def test_a_falling_budget_comes_down_from_the_most_bits_through_every_pair() -> None:
    running = begin(200, budget={"target_bits": 2}, gates={"descent": 0.4})
    rule = rule_in(running)
    assert all(t.quantizer.bits[0] == t.max_bits for t in rule.model.tensors)
    pairs: dict[str, set[tuple[int, int]]] = {name: set() for name in rule.dbps}

    def collect(step: int) -> None:
        for name, dbp in rule.dbps.items():
            pairs[name].add((dbp.larger, dbp.smaller))

    run_with(running, collect)
    assert not rule.dbps
    assert_budget_kept(rule.model, rule.budget.limit)
    largest = max(pairs, key=lambda name: len(pairs[name]))
    ladder = sorted(pairs[largest], reverse=True)
    assert ladder[0][0] == 8
    assert len(ladder) >= 4
    assert all(upper[1] == lower[0] for upper, lower in itertools.pairwise(ladder))


def test_the_bits_of_a_step_are_drawn_anew_and_those_between_steps_are_the_more_probable() -> None:
    running = begin()
    rule, seen = rule_in(running), set()
    before_step = rule.before_step

    def collect(step: int) -> None:
        before_step(step)
        if step < rule.frozen_from:
            seen.add(bits_in_force(rule.model))
            for name, dbp in rule.dbps.items():
                (tensor,) = (t for t in rule.model.tensors if t.name == name)
                assert tensor.quantizer.bits[0] in (dbp.larger, dbp.smaller)

    rule.before_step = collect  # type: ignore[method-assign]

    def check(step: int) -> None:
        for tensor in rule.model.tensors:
            assert tensor.quantizer.choice is None
            assert (int((tensor.quantizer.gate_logits >= 0).sum()),) == tensor.quantizer.bits
            if dbp := rule.dbps.get(tensor.name):
                assert tensor.quantizer.bits == (dbp.larger if dbp.z >= 0 else dbp.smaller,)

    run_with(running, check)
    assert len(seen) > 8


def test_draws_are_the_same_whatever_other_random_numbers_were_drawn() -> None:
    drawn = []
    for disturbance in (0, 5):
        rule = rule_in(begin())
        torch.rand(disturbance)
        steps = []
        for step in range(8):
            rule.before_step(step)
            steps.append(bits_in_force(rule.model))
        drawn.append(steps)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


@pytest.mark.parametrize("levels", ["uniform", "power_of_two"])
def test_fixed_patterns_have_the_range_of_least_error_at_both_bit_widths(levels: str) -> None:
    weights = {"levels": levels, "max_bits": 4}
    rule = rule_in(begin(budget={"target_bits": 2.5}, weights=weights))
    assert rule.dbps
    for tensor in rule.model.tensors:
        if dbp := rule.dbps.get(tensor.name):
            fresh = copy.deepcopy(tensor.quantizer)
            for bits in (dbp.larger, dbp.smaller, dbp.larger, dbp.smaller):
                rule._use(tensor, dbp, bits)
                fresh.fit(tensor.parameter, bits)
                assert tensor.quantizer.log2_clip.tolist() == pytest.approx(
                    fresh.log2_clip.tolist(), abs=1e-5
                )


def test_at_the_freeze_the_most_probable_bits_that_fit_are_taken() -> None:
    """Against all combinations of the pairs, each with its probability."""
    rule = rule_in(begin())
    zs = [2.0, -1.0, 0.5, 0.1, 1.5]
    for z, (name, dbp) in zip(zs, sorted(rule.dbps.items()), strict=True):
        dbp.z = z
        assert name
    names = sorted(rule.dbps)
    now = {t.name: t.quantizer.bits[0] for t in rule.model.tensors}
    best, best_bits = -math.inf, now
    for combination in range(2 ** len(names)):
        bits, log_probability = dict(now), 0.0
        for k, name in enumerate(names):
            dbp, larger = rule.dbps[name], bool(combination >> k & 1)
            bits[name] = dbp.larger if larger else dbp.smaller
            log_probability += math.log(1 / (1 + math.exp(-dbp.z if larger else dbp.z)))
        if expected_cost(rule.model, bits) <= (rule.budget.limit or 0) and log_probability > best:
            best, best_bits = log_probability, bits
    rule.open_fitting = lambda: None  # type: ignore[method-assign]
    rule.before_step(rule.frozen_from)
    assert {t.name: t.quantizer.bits[0] for t in rule.model.tensors} == best_bits
    assert not any(t.quantizer.gate_logits.requires_grad for t in rule.model.tensors)


def test_a_layer_that_is_never_called_gives_its_bytes_away() -> None:
    model = network()
    model.unused = nn.Identity()
    model.unused.layer = nn.Linear(70, 70)
    running = begin(budget={"target_bits": 2.5}, model=model, weights={"max_bits": 4})
    lowest = []
    run_with(
        running,
        lambda step: lowest.append(
            next(
                t.quantizer.bits[0]
                for t in running.gates.model.tensors
                if t.name == "unused.layer.weight"
            )
        ),
    )
    assert min(lowest) == 1
    assert_budget_kept(running.gates.model, running.gates.budget.limit)


def test_without_training_the_bits_are_those_of_a_static_allocation() -> None:
    bits = []
    for name in ("sdq", "fixed"):
        rule = rule_of(rule_recipe(name, {"target_bits": 3}), steps=0)
        rule.start()
        bits.append(bits_in_force(rule.model))
        assert rule.probabilities() == {}
    assert bits[0] == bits[1]
