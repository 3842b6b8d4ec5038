"""Bits for each tensor under a budget: the exact trade between damage and cost (the constraint of Eqn 7, kept)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddqcli.errors import BudgetError

_BUCKETS = 8192  # resolution of the search; rounding costs at most L / 8192 of the budget, and filling up wins it back


@dataclass(frozen=True)
class Choice:
    """What one tensor can be: for each bit-width on offer its cost (bytes, or Eqn 6's count) and its damage (loss)."""

    name: str
    cost: dict[int, int]
    damage: dict[int, float]

    @property
    def least(self) -> int:
        """The cheapest bit-width on offer."""
        return min(self.cost, key=lambda s: (self.cost[s], s))


def smallest(choices: list[Choice]) -> int:
    """The least that the tensors can cost together."""
    return sum(c.cost[c.least] for c in choices)


def check_feasible(choices: list[Choice], budget: int, extra: int = 0) -> None:
    """Raise BudgetError, naming the smallest reachable size and what holds it up, if `budget` cannot be met.

    Args:
        choices: all quantized tensors.
        budget: what they may cost together.
        extra: what comes on top (tensors that stay float), so that the message speaks of the size the user asked for.
    """
    least = smallest(choices)
    if least <= budget:
        return
    heavy = sorted(choices, key=lambda c: -c.cost[c.least])[:3]
    held = ", ".join(f"{c.name} ({c.cost[c.least]:,} at {c.least} bits)" for c in heavy)
    stays = f", of which {extra:,} stay float" if extra else ""
    raise BudgetError(
        f"The budget of {budget + extra:,} bytes cannot be met: the smallest reachable size is {least + extra:,} bytes{stays}. "
        f"The largest at their fewest bits: {held}. Raise the target, lower --min-bits, or lift fixed bits from the recipe."
    )


def allocate(choices: list[Choice], budget: int) -> dict[str, int]:
    """Bits for each tensor with the least total damage at a total cost of at most `budget`.

    A knapsack solved by dynamic programming over costs rounded up to 1/8192 of the budget, then filled up exactly with the
    upgrades of most benefit. Raises BudgetError if even the fewest bits cost more.
    """
    check_feasible(choices, budget)
    base = smallest(choices)
    room = budget - base
    unit = max(1, -(-room // _BUCKETS))
    size = room // unit
    best = np.zeros(size + 1)  # least damage so far with at most this many units above the base
    picks = []
    for choice in choices:
        least = choice.cost[choice.least]
        options = [(s, -(-(cost - least) // unit)) for s, cost in choice.cost.items()]
        rows = np.full((len(options), size + 1), np.inf)
        for row, (s, units) in zip(rows, options, strict=True):
            if units <= size:
                row[units:] = best[: size + 1 - units] + choice.damage[s]
        picks.append((options, rows.argmin(0)))
        best = rows.min(0)
    bits, left = {}, size
    for choice, (options, pick) in zip(reversed(choices), reversed(picks), strict=True):
        s, units = options[pick[left]]
        bits[choice.name] = s
        left -= units
    return _fill(choices, bits, budget)


def _fill(choices: list[Choice], bits: dict[str, int], budget: int) -> dict[str, int]:
    """Spend what rounding left over: the upgrade of most benefit per cost that still fits, again and again."""
    spare = budget - sum(c.cost[bits[c.name]] for c in choices)
    while True:
        upgrades = [
            ((c.damage[bits[c.name]] - c.damage[s]) / (c.cost[s] - c.cost[bits[c.name]]), c, s)
            for c in choices
            for s in c.cost
            if 0 < c.cost[s] - c.cost[bits[c.name]] <= spare and c.damage[s] < c.damage[bits[c.name]]
        ]
        if not upgrades:
            return bits
        _, choice, s = max(upgrades, key=lambda u: u[0])
        spare -= choice.cost[s] - choice.cost[bits[choice.name]]
        bits[choice.name] = s
