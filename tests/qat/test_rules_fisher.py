"""The Fisher rule: bits are allocated again where the gain pays for fresh levels."""

from __future__ import annotations

import pytest
from rule_runs import expected_cost, rule_of, rule_recipe

from ddqcli.qat.rules.fisher import FisherRule
from ddqcli.quant.knapsack import BitOptions


@pytest.mark.parametrize(
    ("share", "trades"), [(0.999, False), (0.975, False), (0.965, True), (0.5, True)]
)
def test_bits_are_traded_only_for_a_gain_worth_fitting_levels_anew(
    share: float, trades: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is made to increase the loss by 1 as it is; the last would with a bit less by
    so much less that `share` of the sum remains."""
    rule = rule_of(rule_recipe("fisher", {"target_bits": 3}), steps=100)
    assert isinstance(rule, FisherRule)
    rule.start()
    tensors = rule.model.tensors
    before = {t.name: t.quantizer.bits[0] for t in tensors}
    for tensor in tensors:
        tensor.quantizer.levels.data += 1.5  # as training would
    trained = {t.name: t.quantizer.levels.clone() for t in tensors}
    last, *others = (t for t in reversed(tensors) if not t.fixed)
    options = []
    for tensor in tensors:
        widths = range(tensor.min_bits, tensor.max_bits + 1)
        costs = {s: expected_cost(rule.model, {**before, tensor.name: s}) for s in widths}
        increase = {s: 1.0 if s == before[tensor.name] else 9.0 for s in costs}
        if tensor is last:
            increase[before[last.name] - 1] = 1 - len(tensors) * (1 - share)
        options.append(BitOptions(tensor.name, costs, increase))
    limit = sum(option.cost[before[option.name]] for option in options)
    monkeypatch.setattr(rule, "options", lambda: options)
    monkeypatch.setattr(rule, "limit", lambda step: limit)
    rule.before_step(min(rule.looks_at))
    assert last.quantizer.bits == (before[last.name] - trades,)
    assert last.quantizer.levels.equal(trained[last.name]) != trades
    for tensor in others:
        assert tensor.quantizer.bits == (before[tensor.name],)
        assert tensor.quantizer.levels.equal(trained[tensor.name])


def test_the_limit_falls_along_a_cubic_from_all_bits_to_the_budget() -> None:
    gates = {"descent": 0.4, "freeze": 0.5}
    rule = rule_of(rule_recipe("fisher", {"target_bits": 3}, gates=gates), steps=100)
    budget = rule.budget.limit or 0
    most = expected_cost(rule.model, {t.name: t.max_bits for t in rule.model.tensors})
    assert rule.limit(0) == most
    assert rule.limit(20) == budget + (most - budget) // 8
    assert rule.limit(40) == rule.limit(49) == rule.limit(100) == budget
