"""Bit-widths under a budget against exhaustive search."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from quant_cases import few

from ddqcli.errors import BudgetError
from ddqcli.quant.knapsack import BitOptions, allocate, check_feasible, minimum_cost


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[BitOptions], int]:
    """Up to 4 tensors of up to 4 bit-widths, costs and losses in any order; a feasible budget."""
    choices = []
    for number in range(draw(st.integers(1, 4))):
        options = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
        cost = {s: draw(st.integers(1, 40)) for s in options}
        choices.append(
            BitOptions(f"t{number}", cost, {s: draw(st.integers(0, 100)) / 4 for s in options})
        )
    return choices, minimum_cost(choices) + draw(st.integers(0, 100))


def cost(choices: list[BitOptions], bits: dict[str, int]) -> int:
    return sum(c.cost[bits[c.name]] for c in choices)


def loss_increase(choices: list[BitOptions], bits: dict[str, int]) -> float:
    return sum(c.loss_increase[bits[c.name]] for c in choices)


def network(seed: int, layers: int = 24) -> list[BitOptions]:
    """Layers of 10 to 10^6 weights with a table of levels each; the loss increase falls as 4^-s."""
    rng = np.random.default_rng(seed)
    sizes = (10 ** rng.uniform(1, 6, layers)).astype(int)
    return [
        BitOptions(
            f"layer{number}",
            {s: int(-(-size * s // 8) + 2**s + 6) for s in range(1, 9)},
            {s: float(size * weight * 4.0**-s) for s in range(1, 9)},
        )
        for number, (size, weight) in enumerate(
            zip(sizes, rng.lognormal(0, 2, layers), strict=True)
        )
    ]


@few
@given(problems())
def test_no_other_choice_within_the_budget_increases_the_loss_less(problem):
    choices, budget = problem
    bits = allocate(choices, budget)
    assert bits.keys() == {c.name for c in choices}
    assert cost(choices, bits) <= budget
    names = [c.name for c in choices]
    every = (
        dict(zip(names, options, strict=True))
        for options in itertools.product(*(c.cost for c in choices))
    )
    assert loss_increase(choices, bits) == min(
        loss_increase(choices, b) for b in every if cost(choices, b) <= budget
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_few_large_tensors_get_the_exact_optimum(seed):
    """A budget that some combination meets to the byte is used to the byte."""
    rng = np.random.default_rng(seed)
    sizes = (10 ** rng.uniform(4, 7, 4)).astype(int)
    choices = [
        BitOptions(
            f"t{n}",
            {s: int(size * s // 8) for s in range(1, 9)},
            {s: float(size * 4.0**-s) for s in range(1, 9)},
        )
        for n, size in enumerate(sizes)
    ]
    names = [c.name for c in choices]
    every = [dict(zip(names, b, strict=True)) for b in itertools.product(range(1, 9), repeat=4)]
    budget = cost(choices, every[int(rng.integers(len(every)))])
    best = min(loss_increase(choices, b) for b in every if cost(choices, b) <= budget)
    assert loss_increase(choices, allocate(choices, budget)) == pytest.approx(best, rel=1e-12)


def test_bits_that_no_tensor_needs_go_to_those_that_they_cost_nothing():
    """All-zero or ternary weights lose nothing at few bits, but training moves them away."""
    idle = BitOptions("idle", {s: 100 * s for s in range(1, 9)}, dict.fromkeys(range(1, 9), 0.0))
    other = BitOptions("other", {1: 10, 2: 20}, {1: 3.0, 2: 1.0})
    assert allocate([idle, other], 650) == {"idle": 6, "other": 2}
    worse = BitOptions("worse", {1: 10, 2: 20}, {1: 1.0, 2: 3.0})
    assert allocate([worse], 100) == {"worse": 1}


@few
@given(problems(), st.integers(0, 60))
def test_more_budget_never_increases_the_loss_more(problem, more):
    choices, budget = problem
    before, after = allocate(choices, budget), allocate(choices, budget + more)
    assert loss_increase(choices, after) <= loss_increase(choices, before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", [1.2, 2, 3.3, 4, 6.5])
def test_a_network_uses_98_percent_of_its_budget_and_never_more(seed, average):
    choices = network(seed)
    budget = minimum_cost(choices) + int((average - 1) / 8 * sum(c.cost[8] for c in choices))
    used = cost(choices, allocate(choices, budget))
    assert 0.98 * budget <= used <= budget


@pytest.mark.parametrize("seed", range(2))
def test_a_network_comes_within_3_percent_of_the_lagrangian_bound(seed):
    """No choice beats the sum over tensors of min(loss + price * cost), minus price * budget."""
    choices = network(seed, layers=80)  # with few layers even the optimum is far above the bound
    costs = np.array([list(c.cost.values()) for c in choices])
    losses = np.array([list(c.loss_increase.values()) for c in choices])
    for average in (2, 4):
        budget = minimum_cost(choices) + int((average - 1) / 8 * sum(c.cost[8] for c in choices))
        bound = max(
            (losses + price * costs).min(1).sum() - price * budget
            for price in np.geomspace(1e-6, 1e2, 500)
        )
        assert bound <= loss_increase(choices, allocate(choices, budget)) <= 1.03 * bound


def test_the_loss_increase_falls_as_the_budget_of_a_network_grows():
    choices = network(9)
    budgets = np.linspace(minimum_cost(choices), sum(c.cost[8] for c in choices), 12).astype(int)
    losses = [loss_increase(choices, allocate(choices, int(b))) for b in budgets]
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(losses))
    assert set(allocate(choices, int(budgets[-1])).values()) == {8}
    assert set(allocate(choices, int(budgets[0])).values()) == {1}


def test_costs_may_be_as_large_as_eqn_6_counts():
    choices = [
        BitOptions(
            f"t{n}", {s: 10**7 * 2**s for s in range(1, 9)}, {s: 4.0**-s for s in range(1, 9)}
        )
        for n in range(3)
    ]
    budget = 3 * 10**7 * 16
    bits = allocate(choices, budget)
    assert cost(choices, bits) <= budget
    assert sorted(bits.values()) == [4, 4, 4]


def test_tensors_with_one_option_keep_their_bits():
    free = BitOptions("free", {1: 10, 2: 20}, {1: 9.0, 2: 1.0})
    assert allocate([BitOptions("fixed", {8: 100}, {8: 0.0}), free], 120) == {"fixed": 8, "free": 2}
    assert allocate([BitOptions("fixed", {8: 100}, {8: 0.0}), free], 119) == {"fixed": 8, "free": 1}


def test_without_tensors_there_are_no_bits():
    assert allocate([], 0) == {}


@few
@given(problems(), st.integers(1, 1000))
def test_an_infeasible_budget_names_the_smallest_reachable_size(problem, extra):
    choices, _ = problem
    least = minimum_cost(choices)
    assert least == min(
        sum(options) for options in itertools.product(*(c.cost.values() for c in choices))
    )
    check_feasible(choices, least)
    assume(least > 1)
    message = (
        f"smallest reachable size is {least + extra:,} bytes, "
        f"{extra:,} of them outside the quantized tensors."
    )
    with pytest.raises(BudgetError, match=re.escape(message)):
        check_feasible(choices, least - 1, {"norm": extra})
    with pytest.raises(BudgetError, match=re.escape(f"budget of {least - 1:,} bytes")):
        allocate(choices, least - 1)


def test_the_message_names_the_three_largest_items_largest_first():
    choices = [BitOptions(f"layer{n}", {2: 1000 * n, 8: 4000 * n}, {}) for n in range(1, 6)]
    with pytest.raises(BudgetError) as caught:
        check_feasible(choices, 9000)
    assert (
        "layer5 at 2 bits (5,000), layer4 at 2 bits (4,000), layer3 at 2 bits (3,000). Raise"
        in str(caught.value)
    )
    with pytest.raises(BudgetError) as caught:
        check_feasible(
            choices,
            9000,
            {"head, float": 4500},
            in_unit="{:,} values".format,
            remedies=["quantize the head"],
        )
    largest = "layer5 at 2 bits (5,000), head, float (4,500), layer4 at 2 bits (4,000). "
    assert f"{largest}Raise the target, or quantize the head." in str(caught.value)
    assert "13,500 values cannot" in str(caught.value)
