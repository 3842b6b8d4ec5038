"""Budgets in bytes: what is refused, with which remedies, and the smallest that is accepted."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rule_runs import (
    bits_in_force,
    expected_cost,
    fewest_bits,
    file_bytes,
    finished_run,
    float_bytes,
    network,
    rule_of,
    rule_recipe,
)

from ddqcli.errors import BudgetError
from ddqcli.qat.budget import kept_bytes, make_budget
from ddqcli.qat.convert import convert


@pytest.mark.parametrize(
    "budget",
    [
        {"target_bits": 0.9},
        {"target_bits": 1.0},
        {"target_size": "1%"},
        {"target_bits": 0.5, "count": "eqn6"},
    ],
)
def test_an_impossible_budget_is_refused_with_the_smallest_size(budget: dict[str, Any]) -> None:
    recipe = rule_recipe("fisher", budget)
    model = convert(network(), recipe)
    least = expected_cost(model, fewest_bits(model), eqn6="count" in budget)
    if "target_size" in budget:
        least += (
            float_bytes(model) + make_budget(model, rule_recipe("fisher", None)).description_bytes
        )
    unit = "by Eqn" if "count" in budget else "bytes"
    size = (
        rf"{least:,} bytes"
        if "target_size" in budget
        else rf"[\d.]+ bits a weight .{least:,} {unit}"
    )
    message = rf"smallest reachable size is {size}.*8.weight at 1 bit \("
    with pytest.raises(BudgetError, match=message) as caught:
        make_budget(model, recipe)
    assert "min-bits" not in str(caught.value), "there are no fewer than one"


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ({"target_bits": 0.5}, r"of 0\.5 bits a weight \([\d,]+ bytes\) cannot"),
        ({"target_bits": 0.25, "count": "eqn6"}, r"of 0\.25 bits a weight \([\d,]+ by Eqn"),
        ({"target_size": "1%"}, r"of 1% \([\d,]+ bytes of the whole file\) cannot"),
    ],
)
def test_a_refusal_answers_in_the_unit_of_the_target(budget: dict[str, Any], named: str) -> None:
    model = convert(network(), rule_recipe("fisher", None))
    with pytest.raises(BudgetError, match=named) as caught:
        make_budget(model, rule_recipe("fisher", budget))
    if "target_bits" not in budget:
        return
    found = re.search(r"smallest reachable size is ([\d.]+) bits a weight", str(caught.value))
    least = float(found[1]) if found else 0.0
    assert make_budget(model, rule_recipe("fisher", budget | {"target_bits": least})).limit
    with pytest.raises(BudgetError):
        make_budget(model, rule_recipe("fisher", budget | {"target_bits": least - 0.001}))


@pytest.mark.parametrize(
    ("target_bits", "sections", "message"),
    [
        (12, {}, r"12 bits a weight .* more than 8 \(.*; lower the target\.$"),
        (5, {"weights": {"levels": "power_of_two"}}, r"more than 4 .*; lower the target\.$"),
        (5, {"weights": {"max_bits": 4}}, r"more than 4 .*, or raise --max-bits\.$"),
        (
            6.5,
            {"weights": {"max_bits": 4}, "overrides": [{"match": "8", "max_bits": 6}]},
            "more than 6 ",
        ),
    ],
)
def test_more_bits_than_weights_may_have_are_refused(
    target_bits: float, sections: dict[str, Any], message: str
) -> None:
    recipe = rule_recipe("fisher", {"target_bits": target_bits}, **sections)
    with pytest.raises(BudgetError, match=message):
        make_budget(convert(network(), recipe), recipe)


@pytest.mark.parametrize(
    ("target_bits", "sections"),
    [
        (8, {}),
        (4, {"weights": {"max_bits": 4}}),
        (5, {"weights": {"max_bits": 4}, "overrides": [{"match": "8", "bits": 6}]}),
        (5, {"weights": {"max_bits": 4, "granularity": "channel"}}),  # the tables take the rest
    ],
)
def test_as_many_bits_as_weights_and_their_tables_take_are_allowed(
    target_bits: float, sections: dict[str, Any]
) -> None:
    recipe = rule_recipe("fisher", {"target_bits": target_bits}, **sections)
    assert make_budget(convert(network(), recipe), recipe).limit


REMEDIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fewest bits": (
        {"target_bits": 3},
        {"weights": {"min_bits": 4}},
        "Raise the target, or lower --min-bits",
    ),
    "all at 4 bits": (
        {"target_bits": 3},
        {"weights": {"min_bits": 4, "max_bits": 4}},
        "target, or lower --min-bits",
    ),
    "fixed bits": (
        {"target_bits": 2},
        {"overrides": [{"match": "8", "bits": 8}]},
        "target, or lift bits and min_bits from",
    ),
    "skipped": (
        {"target_size": "20kB"},
        {"overrides": [{"match": "8", "skip": True}]},
        "target, or lift skip from",
    ),
    "skipped, and not counted": (
        {"target_bits": 1},
        {"overrides": [{"match": "8", "skip": True}]},
        "Raise the target, or lower",
    ),
    "by channel": (
        {"target_bits": 1.2},
        {"weights": {"granularity": "channel"}},
        "or set weights.granularity=layer",
    ),
    "biases in float": (
        {"target_size": "2kB"},
        {"weights": {"bias_bits": None}},
        "target, or set weights.bias_bits=8.",
    ),
    "no biases": ({"target_bits": 0.5}, {"weights": {"bias_bits": None}}, "Raise the target."),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_a_refusal_names_what_helps(case: str) -> None:
    budget, sections, message = REMEDIES[case]
    recipe = rule_recipe("fisher", budget, **sections)
    with pytest.raises(BudgetError, match=re.escape(message)):
        make_budget(convert(network(), recipe), recipe)


def test_a_dry_run_that_only_unused_layers_make_possible_takes_the_fewest_bits() -> None:
    recipe = rule_recipe("fixed", {"target_size": "1"}, activations={"bits": 4})
    model = convert(network(), recipe)
    least = sum(kept_bytes(model).values()) + expected_cost(model, fewest_bits(model))
    unlimited = rule_recipe("fixed", None, activations={"bits": 4})
    least += make_budget(model, unlimited).description_bytes
    recipe = rule_recipe("fixed", {"target_size": f"{least - 50}"}, activations={"bits": 4})
    rule = rule_of(recipe, model, steps=0)
    rule.start()
    assert bits_in_force(model) == (1, 8) * 5
    with pytest.raises(BudgetError, match=f"smallest reachable size is {least:,} bytes"):
        rule.recount()


def test_the_smallest_possible_budget_is_accepted() -> None:
    model = convert(network(), rule_recipe("fisher", None))
    least = expected_cost(model, fewest_bits(model)) + float_bytes(model)
    least += make_budget(model, rule_recipe("fisher", None)).description_bytes
    finished, _ = finished_run(rule_recipe("fisher", {"target_size": f"{least}"}), 3)
    assert bits_in_force(finished.gates.model) == (1, 8) * 5
    with pytest.raises(BudgetError):
        make_budget(model, rule_recipe("fisher", {"target_size": f"{least - 1}"}))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_files_keep_targets_in_bytes_to_the_byte_and_come_near(granularity: str) -> None:
    sections = {"weights": {"granularity": granularity}, "activations": {"bits": 8}}
    largest = file_bytes(convert(network(), rule_recipe("fixed", None, **sections)))
    for target in range(largest // 2, largest + 200, 797):
        rule = rule_of(rule_recipe("fixed", {"target_size": f"{target}"}, **sections), steps=0)
        rule.start()
        nbytes = file_bytes(rule.model)
        assert nbytes <= target
        assert rule.budget.file_limit == target
        if target <= largest:
            assert nbytes > 0.9 * target


@pytest.mark.parametrize("rule", ["fisher", "fixed", "sdq"])
def test_only_bit_widths_that_are_offered_are_given(rule: str) -> None:
    chosen = set()
    for target in (1.5, 2.5, 3.2, 4.5, 5.0, 5.5, 6.5, 7.0):
        sections = {"weights": {"bits_offered": [1, 2, 3, 4, 6, 8]}}
        running = rule_of(rule_recipe(rule, {"target_bits": target}, **sections), steps=0)
        running.start()
        assert running.budget.limit is not None
        assert running.cost() <= running.budget.limit
        chosen |= set(bits_in_force(running.model))
    assert chosen <= {1, 2, 3, 4, 6, 8}
    assert {2, 4, 6} <= chosen


def test_header_and_manifest_are_counted_as_they_are() -> None:
    model = convert(network(), rule_recipe("fixed", None, activations={"bits": 4}))
    budget = make_budget(model, rule_recipe("fixed", None))
    beside = file_bytes(model) - expected_cost(model) - budget.overhead_bytes
    assert 0 <= budget.description_bytes - beside <= 8
    meta = {"report": "0123456789" * 3}
    described = make_budget(model, rule_recipe("fixed", None), meta=meta)
    assert described.meta == meta
    assert described.description_bytes > budget.description_bytes
