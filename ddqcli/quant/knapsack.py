"""The bits of least total loss increase at a cost within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddqcli.errors import BudgetError

_STATES = 4096  # combinations that the search keeps after each tensor
_NAMED = 3  # of what holds a size up


@dataclass(frozen=True)
class BitOptions:
    """What one tensor can be: for each bit-width on offer its cost (bytes, or Eqn 6's count) and its damage (loss)."""

    name: str
    cost: dict[int, int]
    damage: dict[int, float]

    @property
    def least(self) -> int:
        """The cheapest bit-width on offer."""
        return min(self.cost, key=lambda s: (self.cost[s], s))


def minimum_cost(choices: Sequence[BitOptions]) -> int:
    """The least that the tensors can cost together."""
    return sum(c.cost[c.least] for c in choices)


def check_feasible(
    choices: Sequence[BitOptions],
    budget: int,
    beside: Mapping[str, int] | None = None,
    *,
    unit: str = "bytes",
    remedies: Sequence[str] = (),
) -> None:
    """Raise BudgetError, naming the smallest reachable size and what holds it up, if `budget` cannot be met.

    Args:
        choices: all quantized tensors.
        budget: what they may cost together.
        beside: what comes on top by name, if the user's target counts it too, so that the message speaks of the size asked for.
        unit: what costs are counted in.
        remedies: what can be done beside raising the target.
    """
    extra = sum((beside or {}).values())
    least = minimum_cost(choices) + extra
    if least <= budget + extra:
        return
    weights = {f"{c.name} at {c.least} bit{'s' * (c.least > 1)}": c.cost[c.least] for c in choices}
    heavy = sorted((weights | dict(beside or {})).items(), key=lambda item: -item[1])[:_NAMED]
    stays = f", {extra:,} of them beside the quantized tensors" if extra else ""
    raise BudgetError(
        f"The budget of {budget + extra:,} {unit} cannot be met: the smallest reachable size is {least:,} {unit}{stays}. "
        f"The largest there: {', '.join(f'{name} ({size:,})' for name, size in heavy)}. "
        f"{', or '.join(['Raise the target', *remedies])}."
    )


def allocate(choices: Sequence[BitOptions], budget: int) -> dict[str, int]:
    """Bits for each tensor with the least total damage at a total cost of at most `budget`; equal damage for more bits is taken.

    A knapsack solved by dynamic programming over the combinations that no other beats in both cost and damage. While there are
    at most 4096 of them this is exact; beyond, the best of each of 4096 slices of the budget go on, and what is left over in the
    end is filled up. Raises BudgetError if even the fewest bits cost more.
    """
    check_feasible(choices, budget)
    room = budget - minimum_cost(choices)
    cost, damage = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for choice in choices:
        above = np.array([choice.cost[s] - choice.cost[choice.least] for s in choice.cost])
        costs = (cost[:, None] + above).reshape(-1)
        damages = (damage[:, None] + np.array([choice.damage[s] for s in choice.cost])).reshape(-1)
        kept = np.lexsort((damages, costs))
        kept = kept[costs[kept] <= room]
        before = np.minimum.accumulate(damages[kept])[:-1]
        kept = kept[np.append(True, damages[kept[1:]] < before)]
        if len(kept) > _STATES:
            slices = costs[kept] * _STATES // (room + 1)
            kept = kept[
                np.append(slices[:-1] != slices[1:], True)
            ]  # the last of a slice does the least damage
        cost, damage = costs[kept], damages[kept]
        steps.append(kept)
    bits, state = {}, len(cost) - 1
    for choice, kept in zip(reversed(choices), reversed(steps), strict=True):
        state, option = divmod(int(kept[state]), len(choice.cost))
        bits[choice.name] = list(choice.cost)[option]
    return _fill(choices, bits, budget)


def _fill(choices: Sequence[BitOptions], bits: Mapping[str, int], budget: int) -> dict[str, int]:
    """Spend what `bits` leave of the budget: the upgrade of most benefit per cost that still fits, again and again.

    One without benefit is taken too, the largest first: weights that few levels hold exactly move on while training.
    """
    bits = dict(bits)
    spare = budget - sum(c.cost[bits[c.name]] for c in choices)
    while True:
        upgrades = []
        for c in choices:
            now = bits[c.name]
            for s, cost in c.cost.items():
                more, gain = cost - c.cost[now], c.damage[now] - c.damage[s]
                if 0 < more <= spare and gain >= 0:
                    upgrades.append((gain / more, more, c.name, s))
        if not upgrades:
            return bits
        _, more, name, s = max(upgrades)
        bits[name] = s
        spare -= more
