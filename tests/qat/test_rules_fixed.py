"""The static rule: one allocation, to the layers that the loss feels most."""

from __future__ import annotations

from copy import deepcopy

import pytest
from rule_runs import assert_budget_kept, finished_run, network, rule_of, rule_recipe
from torch import nn


def test_bits_go_where_the_loss_feels_them() -> None:
    """Of two equal layers, the one with the larger gradients gets more bits."""
    rule = rule_of(rule_recipe("fixed", {"target_bits": 3}))
    names = [t.name for t in rule.model.tensors if t.kind != "bias"]
    rule.fisher.seen = 1
    for strong, weak in (("5.weight", "8.weight"), ("8.weight", "5.weight")):
        rule.fisher.mean_square = {name: 1.0 if name == strong else 1e-4 for name in names}
        rule.start()
        bits = {t.name: t.quantizer.bits[0] for t in rule.model.tensors}
        assert bits[strong] > bits[weak]
        assert_budget_kept(rule.model, rule.budget.limit)


@pytest.mark.parametrize("frozen", [5, 8])
def test_a_frozen_layer_gets_about_the_bits_that_it_would_get_otherwise(frozen: int) -> None:
    """Its gradients are not measured. One that is never called has none, and gets what is left."""
    model = network()
    model.unused = nn.Identity()
    model.unused.layer = nn.Linear(128, 40)
    recipe = rule_recipe("fixed", {"target_bits": 3})
    trained, _ = finished_run(recipe, 1, deepcopy(model))
    model[frozen].requires_grad_(False)
    held, _ = finished_run(recipe, 1, model)
    before, after = (
        {t.name: t.quantizer.bits[0] for t in run.gates.model.tensors} for run in (trained, held)
    )
    assert f"{frozen}.weight" not in held.gates.fisher.mean_square
    assert abs(before[f"{frozen}.weight"] - after[f"{frozen}.weight"]) <= 1
    assert after["unused.layer.weight"] == 1


def test_weights_beyond_the_square_root_of_float32_are_weighed_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.Linear(40, 10))
    model[1].weight.data *= 1e25
    rule = rule_of(rule_recipe("fixed", {"target_bits": 4}), model)
    rule.start()
    assert_budget_kept(rule.model, rule.budget.limit)
