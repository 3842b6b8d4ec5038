"""The rules by the names that recipes give them.

A new rule is one module here, an entry in `RULES`, and its name in `GatesSection.rule`; SDQ's is
chosen by the recipe's `method`.
"""

from __future__ import annotations

from ddqcli.qat.budget import ResolvedBudget
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.base import Rule
from ddqcli.qat.rules.fisher import FisherRule
from ddqcli.qat.rules.fixed import FixedRule
from ddqcli.qat.rules.paper import PaperRule
from ddqcli.qat.rules.sdq import SDQRule
from ddqcli.recipe.schema import Recipe

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (FisherRule, PaperRule, FixedRule, SDQRule)
}


def make_rule(
    name: str,
    model: QuantizedModel,
    recipe: Recipe,
    budget: ResolvedBudget,
    steps: int,
    batch_size: int,
) -> Rule:
    """Return a rule that decides the bits of a run of so many steps."""
    return RULES[name](model, recipe, budget, steps, batch_size)
