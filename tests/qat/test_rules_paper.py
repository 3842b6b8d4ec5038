"""The paper's rule: gates follow Eqn (7)'s gradient, and the budget is met at the freeze."""

from __future__ import annotations

import pytest
import torch
from rule_runs import expected_cost, finished_run, network, rule_of, rule_recipe
from small_models import random_data, trainer


@pytest.mark.parametrize("count", ["bytes", "eqn6"])
def test_gates_follow_the_gradient_of_the_budgets_own_measure(count: str) -> None:
    """Eqn (7) at the last open gate: -alpha * loss * what closing it saves / the cost of all."""
    budget = {"target_bits": 3.3, "count": count}
    gates = {"lr": 1.0, "init": 0.5, "alpha": -0.3}
    rule = rule_of(rule_recipe("paper", budget, gates=gates))
    rule.start()
    tensors = [t for t in rule.model.tensors if not t.fixed]
    for tensor in tensors:
        tensor.quantizer.gate_logits.grad = torch.zeros_like(tensor.quantizer.gate_logits)
    whole = {t.name: t.max_bits for t in rule.model.tensors}
    cost = expected_cost(rule.model, whole, count == "eqn6")
    rule.after_backward(1, loss=torch.tensor(2.0))
    for tensor in tensors:
        saved = cost - expected_cost(rule.model, {**whole, tensor.name: 7}, count == "eqn6")
        expected = sorted([0.5] * 7 + [0.5 - 0.3 * 2.0 * saved / cost], reverse=True)
        assert tensor.quantizer.gate_logits[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_gates_close_while_the_budget_is_exceeded() -> None:
    """With steps of the logits' size, Eqn (7)'s own gradient closes gates before the freeze."""
    gates = {"freeze": 1.0, "lr": 1.0, "init": 1e-3, "alpha": -1.0}
    _, history = finished_run(rule_recipe("paper", {"target_bits": 2}, gates=gates), 20)
    assert history[0] != history[-2]
    assert sum(history[-2]) < sum(history[0])


def test_gates_that_closed_too_many_are_opened_again() -> None:
    gates = {"freeze": 0.6, "lr": 1.0, "init": 1e-3, "alpha": -15.0}
    recipe = rule_recipe(
        "paper", {"target_bits": 4}, gates=gates, train={"optimizer": "sgd", "lr": 1e-4}
    )
    running = trainer(network(), recipe, 10, random_data())
    used = []
    after_backward = running.gates.after_backward

    def watched(step: int, loss: float) -> None:
        after_backward(step, loss)
        used.append(running.gates.cost() / (running.gates.budget.limit or 1))

    running.gates.after_backward = watched
    running.run(lambda metrics: None, lambda look: None, lambda: None)
    assert used[5] < 0.7
    assert used[6] > 0.98
