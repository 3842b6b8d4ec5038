"""Bit-widths of least total loss increase within a budget: a knapsack over all tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddqcli.errors import BudgetError

_MAX_STATES = 4096  # partial solutions kept after each tensor
_LARGEST_NAMED = 3  # items that an error message names


@dataclass(frozen=True)
class BitOptions:
    """The bit-widths that one tensor can have.

    Attributes:
        name: the tensor.
        cost: cost at each bit-width, in bytes or by Eqn (6)'s count.
        loss_increase: expected increase of the loss at each bit-width.
    """

    name: str
    cost: dict[int, int]
    loss_increase: dict[int, float]

    @property
    def cheapest_bits(self) -> int:
        """The bit-width of least cost."""
        return min(self.cost, key=lambda s: (self.cost[s], s))


def minimum_cost(choices: Sequence[BitOptions]) -> int:
    """Least total cost of the tensors."""
    return sum(c.cost[c.cheapest_bits] for c in choices)


def check_feasible(
    choices: Sequence[BitOptions],
    budget: int,
    overhead: Mapping[str, int] | None = None,
    *,
    target: str = "",
    in_unit: Callable[[int], str] = "{:,} bytes".format,
    remedies: Sequence[str] = (),
) -> None:
    """Raise BudgetError if the tensors cannot meet `budget`.

    The message names the smallest reachable size and the largest items in it.

    Args:
        choices: all quantized tensors.
        budget: the most that they may cost together.
        overhead: cost of what is not quantized, by name, if the user's target counts it too. The
            message then speaks of the target that the user set.
        target: the target as the user set it; by default, `budget` in its unit.
        in_unit: writes a cost in the unit of the target.
        remedies: what else can be done than raising the target.
    """
    extra = sum((overhead or {}).values())
    least = minimum_cost(choices) + extra
    if least <= budget + extra:
        return
    sizes = {_at_fewest_bits(c): c.cost[c.cheapest_bits] for c in choices} | dict(overhead or {})
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_LARGEST_NAMED]
    of_overhead = f", {extra:,} of them outside the quantized tensors" if extra else ""
    raise BudgetError(
        f"The budget of {target or in_unit(budget + extra)} cannot be met: "
        f"the smallest reachable size is {in_unit(least)}{of_overhead}. "
        f"The largest there: {', '.join(f'{name} ({size:,})' for name, size in largest)}. "
        f"{', or '.join(['Raise the target', *remedies])}."
    )


def _at_fewest_bits(choice: BitOptions) -> str:
    return f"{choice.name} at {choice.cheapest_bits} bit{'s' * (choice.cheapest_bits > 1)}"


def allocate(choices: Sequence[BitOptions], budget: int) -> dict[str, int]:
    """Return the bits of each tensor for the least total loss increase within `budget`.

    Dynamic programming over the partial solutions that no other beats in both cost and loss
    increase. Up to 4096 of them this is exact. Beyond, the best of each of 4096 slices of the
    budget is kept, and what remains of the budget in the end is spent greedily. Of equal loss
    increases the one with more bits is taken. Raises BudgetError if even the cheapest bits exceed
    the budget.
    """
    check_feasible(choices, budget)
    room = budget - minimum_cost(choices)
    cost, increase = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for choice in choices:
        least = choice.cost[choice.cheapest_bits]
        option_cost = np.array([c - least for c in choice.cost.values()])
        option_increase = np.array([choice.loss_increase[s] for s in choice.cost])
        costs = (cost[:, None] + option_cost).reshape(-1)
        increases = (increase[:, None] + option_increase).reshape(-1)
        kept = _undominated(costs, increases, room)
        cost, increase = costs[kept], increases[kept]
        steps.append(kept)
    bits, state = {}, len(cost) - 1
    for choice, kept in zip(reversed(choices), reversed(steps), strict=True):
        state, option = divmod(int(kept[state]), len(choice.cost))
        bits[choice.name] = list(choice.cost)[option]
    return _spend_rest(choices, bits, budget)


def _undominated(costs: np.ndarray, increases: np.ndarray, room: int) -> np.ndarray:
    """Indices of at most `_MAX_STATES` solutions within `room` that no other beats in both."""
    kept: np.ndarray = np.lexsort((increases, costs))
    kept = kept[costs[kept] <= room]
    best_before = np.minimum.accumulate(increases[kept])[:-1]
    kept = kept[np.append(True, increases[kept[1:]] < best_before)]
    if len(kept) > _MAX_STATES:
        slices = costs[kept] * _MAX_STATES // (room + 1)
        kept = kept[np.append(slices[:-1] != slices[1:], True)]  # the last of a slice is its best
    return kept


def _spend_rest(
    choices: Sequence[BitOptions], bits: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Spend what `bits` leave of the budget, always on the upgrade of most benefit per cost.

    Upgrades without benefit are made too, the largest first: weights that few levels hold exactly
    move on in training.
    """
    bits = dict(bits)
    spare = budget - sum(c.cost[bits[c.name]] for c in choices)
    while True:
        upgrades = []
        for c in choices:
            now = bits[c.name]
            for s, cost in c.cost.items():
                more, gain = cost - c.cost[now], c.loss_increase[now] - c.loss_increase[s]
                if 0 < more <= spare and gain >= 0:
                    upgrades.append((gain / more, more, c.name, s))
        if not upgrades:
            return bits
        _, more, name, s = max(upgrades)
        bits[name] = s
        spare -= more
