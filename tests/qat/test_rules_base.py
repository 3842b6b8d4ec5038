"""Under every rule, length and budget, a finished run keeps its budget, and uses it."""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from rule_runs import (
    assert_budget_kept,
    bits_in_force,
    expected_cost,
    fewest_bits,
    file_bytes,
    finished_run,
    network,
    rule_of,
    rule_recipe,
)
from torch import Tensor, nn

from ddqcli.errors import BudgetError, DDQError
from ddqcli.qat.rules.registry import RULES
from ddqcli.runs.report import RunFacts, Source
from ddqcli.training.evaluate import evaluate
from ddqcli.training.report import build_report
from ddqcli.training.trainer import Trainer

BUDGETS: dict[str, dict[str, Any]] = {
    "1.3 bits": {"budget": {"target_bits": 1.3}},
    "2.5 bits": {"budget": {"target_bits": 2.5}},
    "7.9 bits": {"budget": {"target_bits": 7.9}},
    "8 bits": {"budget": {"target_bits": 8}},
    "half the file, more than all can take": {"budget": {"target_size": "50%"}},
    "5 kB": {"budget": {"target_size": "5kB"}},
    "20 % with 4-bit inputs": {"budget": {"target_size": "20%"}, "activations": {"bits": 4}},
    "eqn 6": {"budget": {"target_bits": 3.3, "count": "eqn6"}},
    "fixed bits": {
        "budget": {"target_bits": 3},
        "overrides": [{"match": "0", "bits": 8}, {"match": "8", "bits": 2}],
    },
    "2 to 5 bits": {"budget": {"target_bits": 3.5}, "weights": {"min_bits": 2, "max_bits": 5}},
    "by channel": {
        "budget": {"target_bits": 4},
        "weights": {"granularity": "channel", "max_bits": 6},
    },
    "uniform": {"budget": {"target_bits": 3.5}, "weights": {"levels": "uniform"}},
    "power of two": {"budget": {"target_bits": 3.5}, "weights": {"levels": "power_of_two"}},
    "falling": {"budget": {"target_bits": 3}, "gates": {"descent": 0.3}},
    "falling beyond the freeze": {
        "budget": {"target_bits": 3},
        "gates": {"descent": 1.0, "freeze": 0.4},
    },
    "freezing at the end": {"budget": {"target_bits": 3}, "gates": {"freeze": 1.0}},
    "freezing at once": {"budget": {"target_bits": 3}, "gates": {"freeze": 0.0}},
    "many looks": {"budget": {"target_bits": 3}, "gates": {"looks": 200}},
    "a single look": {"budget": {"target_bits": 3}, "gates": {"looks": 1}},
}
# All rules meet what concerns their freeze; of the other budgets, each meets one of them in turn.
WITH_GATES = ("fisher", "paper", "sdq")
FREEZES = ("falling", "falling beyond the freeze", "freezing at the end", "freezing at once")
CASES = [(name, WITH_GATES[k % 3], 8) for k, name in enumerate(BUDGETS) if name not in FREEZES]
CASES += [(name, rule, 8) for name in FREEZES for rule in WITH_GATES]
CASES += [(name, "fixed", 8) for name in ("20 % with 4-bit inputs", "fixed bits")]
CASES += [("2.5 bits", rule, 0) for rule in RULES]
CASES += [("2.5 bits", rule, 1 + 2 * (k % 2)) for k, rule in enumerate(RULES)]
CASES += [
    (name, rule, steps)
    for name, steps in (("falling beyond the freeze", 1), ("freezing at the end", 3))
    for rule in ("paper", "sdq")
]
CASES += [("2.5 bits", rule, 20) for rule in ("fisher", "sdq")]


@pytest.mark.parametrize(("name", "rule", "steps"), CASES)
def test_a_finished_run_keeps_its_budget(name: str, rule: str, steps: int) -> None:
    sections = deepcopy(BUDGETS[name])
    recipe = rule_recipe(rule, sections.pop("budget"), **sections)
    finished, history = finished_run(recipe, steps)
    model, budget = finished.gates.model, finished.gates.budget
    assert finished.gates.cost() == expected_cost(model, eqn6=budget.eqn6)
    assert_budget_kept(model, budget.limit, eqn6=budget.eqn6)
    if name == "fixed bits":
        bits = {t.name: t.quantizer.bits for t in model.tensors}
        assert (bits["0.weight"], bits["8.weight"]) == ((8,), (2,))
    if recipe.budget.target_size:
        totals = totals_of(finished)
        assert totals["bytes"] <= totals["budget_bytes"]
    frozen_from = 0 if rule == "fixed" else min(int(recipe.gates.freeze * steps), steps - 1)
    assert len(set(history[frozen_from:])) <= 1, "gates moved after they froze"
    assert not history or history[-1] == bits_in_force(model), (
        "the last steps did not train what was delivered"
    )


def totals_of(finished: Trainer) -> dict[str, Any]:
    rule = finished.gates
    report = build_report(
        rule.model,
        rule.budget,
        accuracy=None,
        source=Source(path="", sha256="", arch="", ddq=""),
        run=RunFacts(steps=0, seed=0),
    )
    return report.totals.data()


@pytest.mark.parametrize("rule", RULES)
def test_without_a_budget_every_tensor_keeps_its_most_bits(rule: str) -> None:
    finished, _ = finished_run(rule_recipe(rule, None, weights={"max_bits": 5}), 3)
    assert finished.gates.budget.limit is None
    assert bits_in_force(finished.gates.model) == (5, 8) * 5


def test_layers_without_gradients_share_the_budget_too() -> None:
    """Frozen and never called layers: bits that nobody else needs still make them exact."""
    model = network()
    model[:4].requires_grad_(False)
    model.unused = nn.Identity()
    model.unused.layer = nn.Linear(70, 70)
    finished, _ = finished_run(rule_recipe("fixed", {"target_bits": 4}), 2, model)
    assert_budget_kept(finished.gates.model, finished.gates.budget.limit)


@pytest.mark.parametrize("weights", ["zeros", "ternary", "nine tenths zero"])
@pytest.mark.parametrize(("rule", "bits"), [("fisher", 3.0), ("fixed", 8.0)])
def test_weights_that_few_levels_hold_leave_no_bytes_idle(
    weights: str, rule: str, bits: float
) -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.rand(parameter.shape)
            factors = {
                "zeros": 0 * random,
                "ternary": parameter.sign() * (random < 0.6),
                "nine tenths zero": random < 0.1,
            }
            parameter.mul_(factors[weights])
    finished, _ = finished_run(rule_recipe(rule, {"target_bits": bits}), 3, model)
    assert_budget_kept(finished.gates.model, finished.gates.budget.limit)


def test_channels_whose_bits_differ_are_opened_and_closed_too() -> None:
    recipe = rule_recipe("paper", {"target_bits": 6}, weights={"granularity": "channel"})
    rule = rule_of(recipe, nn.Sequential(nn.Flatten(), nn.Linear(512, 16)))
    weight = rule.model.tensors[0]
    weight.quantizer.fit(weight.parameter, (8, *[3] * 15))
    rule.open_fitting()
    assert_budget_kept(rule.model, rule.budget.limit)
    assert rule.cost() > 0.9 * (rule.budget.limit or 0)
    # With tables of 2^7 levels, 7 bits cost more than 8 do.
    weight.quantizer.fit(weight.parameter, (7, *[8] * 15))
    limit = expected_cost(rule.model, {"1.weight": 8, "1.bias": 8})
    rule.budget = replace(rule.budget, limit=limit)
    rule.close_excess()
    assert weight.quantizer.bits == (8,) * 16


@pytest.mark.parametrize("rule", RULES)
def test_the_state_survives_a_round_trip(rule: str) -> None:
    recipe = rule_recipe(rule, {"target_bits": 3})
    running, _ = finished_run(recipe, 7)
    file = io.BytesIO()
    torch.save(running.gates.state(), file)
    fresh = rule_of(recipe, steps=7)
    file.seek(0)
    fresh.load_state(torch.load(file, weights_only=True))
    assert fresh.state() == running.gates.state()
    assert fresh.cost() == running.gates.cost()
    assert bits_in_force(fresh.model) == bits_in_force(running.gates.model)
    corrections, expected = (
        [t.quantizer.correction for t in r.model.tensors] for r in (fresh, running.gates)
    )
    assert any(correction > 0 for correction in corrections)
    assert corrections == expected


# ---- models whose bytes change while they run


class Buffered(nn.Module):
    """Keeps some of its input: bytes in the file that appear with a forward pass."""

    def __init__(self, grows: str) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.grows == "once":
            self.seen = torch.zeros(300)
        elif (self.grows == "in training" and self.training) or (
            self.grows == "in evaluation" and not self.training
        ):
            self.seen = torch.cat([self.seen, torch.zeros(20)])
        return x


HEADER_STEP = 8  # a budget counts the header of a file with all weights at 8 bits


@pytest.mark.parametrize("grows", ["once", "in training"])
def test_buffers_that_a_forward_pass_makes_are_in_the_budget(grows: str) -> None:
    recipe = rule_recipe("fisher", {"target_size": "7kB"}, weights={"min_bits": 2})
    finished, _ = finished_run(recipe, 8, nn.Sequential(*network(), Buffered(grows)))
    finished.gates.check_kept()
    assert len(finished.model[-1].seen) >= 160
    total = totals_of(finished)["bytes"]
    assert 0 <= total - file_bytes(finished.gates.model) <= HEADER_STEP
    assert total <= 7000
    assert grows != "once" or total > 0.98 * 7000
    recipe = rule_recipe("fisher", {"target_size": "4kB"}, weights={"min_bits": 2})
    with pytest.raises(BudgetError, match=r"The largest there: .*, 10.seen in float \(1,200\)"):
        finished_run(recipe, 1, nn.Sequential(*network(), Buffered("once")))


def test_a_network_that_outgrows_its_budget_in_evaluation_is_refused() -> None:
    model = nn.Sequential(*network(), Buffered("in evaluation"))
    finished, _ = finished_run(rule_recipe("fisher", {"target_size": "7kB"}), 2, model)
    for _ in range(8):
        evaluate(finished.model, finished.data)
    message = r"bytes left to them. The network's buffers grew while it ran"
    with pytest.raises(DDQError, match=message):
        finished.gates.check_kept()


def test_the_input_of_a_layer_that_is_never_called_costs_nothing() -> None:
    def with_unused_layer() -> nn.Module:
        model = network()
        model.unused = nn.Identity()
        model.unused.layer = nn.Linear(70, 70)
        return model

    def run_with(size: str) -> Trainer:
        recipe = rule_recipe("fisher", {"target_size": size}, activations={"bits": 4})
        return finished_run(recipe, 2, with_unused_layer())[0]

    finished = run_with("9kB")
    totals, model = totals_of(finished), finished.gates.model
    assert len(model.activations) == 5
    assert 0 <= totals["bytes"] - file_bytes(model) <= HEADER_STEP
    assert 0.98 * 9000 < totals["bytes"] <= 9000
    beside = totals["kept_bytes"] + totals["manifest_bytes"]
    least = expected_cost(model, fewest_bits(model)) + beside
    assert 0 <= least - file_bytes(run_with(f"{least}").gates.model) <= HEADER_STEP
    with pytest.raises(BudgetError, match=f"smallest reachable size is {least:,} bytes"):
        run_with(f"{least - 1}")
