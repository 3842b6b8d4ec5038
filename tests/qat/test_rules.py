"""Whatever the rule, the length and the budget: a finished run keeps its budget, and uses it."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import RandomBatches, random_data, trainer
from torch import Tensor, nn

from ddqcli.data.batches import Shard
from ddqcli.errors import BudgetError, DDQError
from ddqcli.qat.budget import kept_bytes, make_budget
from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import freeze
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.base import Gates
from ddqcli.quant.knapsack import BitOptions
from ddqcli.quant.quantizer import DDQuantizer
from ddqcli.recipe.schema import Recipe
from ddqcli.training import distributed
from ddqcli.training.calibrate import calibrate
from ddqcli.training.evaluate import evaluate
from ddqcli.training.report import build_report
from ddqcli.training.trainer import Trainer

SOURCE = {"path": "net.pt", "sha256": "", "arch": "net.py:build", "ddq": "0.1.0"}
RUN = {"steps": 0, "seed": 0}
LAYERS = ("0", "3", "5", "8", "9")
VALUES = {"0": 432, "3": 144, "5": 4608, "8": 5120, "9": 400}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 40), nn.Linear(40, 10),
    )  # fmt: skip


def told(rule: str, budget: dict[str, Any] | None, **sections: Any) -> Recipe:
    gates = {"rule": rule, "looks": 2, **sections.pop("gates", {})}
    return Recipe.model_validate(
        {"gates": gates, "budget": budget or {}, "data": {"batch_size": 8}, **sections}
    )


def run(
    recipe: Recipe, steps: int, model: nn.Module | None = None
) -> tuple[Trainer, list[tuple[int, ...]]]:
    """A finished run, and the bits of all groups after each step."""
    running = trainer(model or network(), recipe, steps, random_data())
    bits: list[tuple[int, ...]] = []
    after_backward = running.gates.after_backward

    def watched(step: int, loss: float) -> None:
        after_backward(step, loss)
        bits.append(bits_in_force(running.converted))

    running.gates.after_backward = watched
    running.run(lambda metrics: None, lambda: None)
    return running, bits


def bits_in_force(converted: QuantizedModel) -> tuple[int, ...]:
    return tuple(s for t in converted.tensors for s in t.quantizer.bits)


def cost_of(
    converted: QuantizedModel, bits: dict[str, int] | None = None, eqn6: bool = False
) -> int:
    """The cost by its definition: per tensor the packed indices, per group 2^s levels, scale, zero point and gates."""
    total = 0
    for tensor in converted.tensors:
        groups = [bits[tensor.name]] * len(tensor.quantizer.bits) if bits else tensor.quantizer.bits
        each = tensor.parameter.numel() // len(groups)
        if eqn6:
            total += sum(each * 2**s for s in groups)
        else:
            total += math.ceil(sum(each * s for s in groups) / 8) + sum(
                (2**s if s < 8 else 0) + 6 for s in groups
            )
    return total


def assert_kept(converted: QuantizedModel, limit: int, *, used: bool, eqn6: bool = False) -> None:
    cost = cost_of(converted, eqn6=eqn6)
    assert cost <= limit
    for tensor in converted.tensors:
        bits = tensor.quantizer.bits
        assert all(tensor.min_bits <= s <= tensor.max_bits for s in bits)
        assert tensor.quantizer(tensor.parameter).unique().numel() <= sum(2**s for s in bits)
        assert ((tensor.quantizer.gate_logits >= 0).sum(1) == torch.tensor(bits)).all()
    if used and cost < 0.98 * limit:
        now = {t.name: max(t.quantizer.bits) for t in converted.tensors}
        rises = [
            {**now, t.name: now[t.name] + 1} for t in converted.tensors if now[t.name] < t.max_bits
        ]
        assert all(cost_of(converted, bits, eqn6) > limit for bits in rises), (
            "one more bit would have fitted"
        )


BUDGETS: dict[str, dict[str, Any]] = {
    "1.3 bits": {"budget": {"target_bits": 1.3}},
    "2.5 bits": {"budget": {"target_bits": 2.5}},
    "7.9 bits": {"budget": {"target_bits": 7.9}},
    "12 bits, more than all can take": {"budget": {"target_bits": 12}},
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


LENGTHS = {"fisher": (0, 1, 3), "paper": (0, 1, 3), "fixed": (0, 1, 3, 8)}
SHORT = ("2.5 bits", "20 % with 4-bit inputs", "falling beyond the freeze", "freezing at the end")
CASES = [(name, rule, 8) for name in BUDGETS for rule in ("fisher", "paper")]
CASES += [(name, rule, n) for name in SHORT for rule, lengths in LENGTHS.items() for n in lengths]
CASES += [("2.5 bits", rule, 50) for rule in ("fisher", "paper", "fixed")]


@pytest.mark.parametrize(("name", "rule", "steps"), CASES)
def test_a_finished_run_keeps_its_budget(name: str, rule: str, steps: int) -> None:
    sections = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in BUDGETS[name].items()
    }
    recipe = told(rule, sections.pop("budget"), **sections)
    finished, history = run(recipe, steps)
    converted, budget = finished.converted, finished.gates.budget
    assert budget.limit is not None
    assert finished.gates.cost() == cost_of(converted, eqn6=budget.eqn6)
    assert_kept(converted, budget.limit, used=True, eqn6=budget.eqn6)
    for layer, bits in (("0", 8), ("8", 2)) if name == "fixed bits" else ():
        assert next(t for t in converted.tensors if t.name == f"{layer}.weight").quantizer.bits == (
            bits,
        )
    report = build_report(converted, budget, accuracy=None, source=SOURCE, run=RUN)
    if recipe.budget.target_size:
        assert report.totals.bytes <= report.totals.budget_bytes
    frozen_from = 0 if rule == "fixed" else min(int(recipe.gates.freeze * steps), steps - 1)
    assert len(set(history[frozen_from:])) <= 1, "gates moved after they froze"
    assert not history or history[-1] == bits_in_force(converted), (
        "the last steps did not train what was delivered"
    )


@pytest.mark.parametrize("rule", ["fisher", "paper", "fixed"])
def test_without_a_budget_every_tensor_keeps_its_most_bits(rule: str) -> None:
    finished, _ = run(told(rule, None, weights={"max_bits": 5}), 3)
    assert finished.gates.budget.limit is None
    assert bits_in_force(finished.converted) == (5, 8) * 5


@pytest.mark.parametrize(
    "budget",
    [
        {"target_bits": 0.9},
        {"target_bits": 1.0},
        {"target_size": "1%"},
        {"target_bits": 0.5, "count": "eqn6"},
    ],
)
def test_an_impossible_budget_is_refused_with_what_is_possible(budget: dict[str, Any]) -> None:
    recipe = told("fisher", budget)
    converted = convert(network(), recipe)
    least = cost_of(
        converted, {t.name: t.min_bits for t in converted.tensors}, eqn6="count" in budget
    )
    if "target_size" in budget:
        least += sum(
            value.numel() * value.element_size() for value in converted.float_tensors().values()
        )
    unit = "by Eqn" if "count" in budget else "bytes"
    with pytest.raises(
        BudgetError, match=rf"smallest reachable size is {least:,} {unit}.*8.weight at 1 bit \("
    ) as caught:
        make_budget(converted, recipe)
    assert "min-bits" not in str(caught.value), "there are no fewer than one"


REMEDIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fewest bits": ({"target_bits": 3}, {"weights": {"min_bits": 4}}, "Raise the target, or lower --min-bits"),
    "all at 4 bits": ({"target_bits": 3}, {"weights": {"min_bits": 4, "max_bits": 4}}, "target, or lower --min-bits"),
    "fixed bits": ({"target_bits": 2}, {"overrides": [{"match": "8", "bits": 8}]}, "target, or lift bits and min_bits from"),
    "skipped": ({"target_size": "20kB"}, {"overrides": [{"match": "8", "skip": True}]}, "target, or lift skip from"),
    "skipped, and not counted": ({"target_bits": 1}, {"overrides": [{"match": "8", "skip": True}]}, "Raise the target, or lower"),
    "by channel": ({"target_bits": 1.2}, {"weights": {"granularity": "channel"}}, "or set weights.granularity=layer"),
    "biases in float": ({"target_size": "2kB"}, {"weights": {"bias_bits": None}}, "target, or set weights.bias_bits=8."),
    "no biases": ({"target_bits": 0.5}, {"weights": {"bias_bits": None}}, "Raise the target."),
}  # fmt: skip


@pytest.mark.parametrize("what", REMEDIES)
def test_a_refusal_names_what_helps(what: str) -> None:
    budget, sections, said = REMEDIES[what]
    recipe = told("fisher", budget, **sections)
    with pytest.raises(BudgetError, match=re.escape(said)):
        make_budget(convert(network(), recipe), recipe)


def test_a_dry_run_of_what_only_unused_layers_make_possible_takes_the_fewest_bits() -> None:
    recipe = told("fixed", {"target_size": "1"}, activations={"bits": 4})
    converted = convert(network(), recipe)
    least = sum(kept_bytes(converted).values()) + cost_of(
        converted, {t.name: t.min_bits for t in converted.tensors}
    )
    recipe = told("fixed", {"target_size": f"{least - 50}"}, activations={"bits": 4})
    gates = Gates(converted, recipe, make_budget(converted, recipe), 0, 8)
    gates.start()
    assert bits_in_force(converted) == (1, 8) * 5
    with pytest.raises(BudgetError, match=f"smallest reachable size is {least:,} bytes"):
        gates.recount()


def test_the_smallest_possible_budget_is_accepted() -> None:
    probe = convert(network(), told("fisher", None))
    least = cost_of(probe, {t.name: t.min_bits for t in probe.tensors})
    least += sum(value.numel() * value.element_size() for value in probe.float_tensors().values())
    finished, _ = run(told("fisher", {"target_size": f"{least}"}), 3)
    assert bits_in_force(finished.converted) == (1, 8) * 5
    with pytest.raises(BudgetError):
        make_budget(probe, told("fisher", {"target_size": f"{least - 1}"}))


def test_layers_without_gradients_share_the_budget_too() -> None:
    """Frozen layers, and layers that no forward calls: the bits that nobody else needs still make them exact."""
    model = network()
    model[:4].requires_grad_(False)
    model.unused = nn.Identity()
    model.unused.layer = nn.Linear(70, 70)
    finished, _ = run(told("fixed", {"target_bits": 4}), 2, model)
    assert_kept(finished.converted, finished.gates.budget.limit or 0, used=True)


@pytest.mark.parametrize(
    ("share", "trades"), [(0.999, False), (0.975, False), (0.965, True), (0.5, True)]
)
def test_bits_are_traded_only_for_a_gain_worth_fitting_levels_anew(
    share: float, trades: bool
) -> None:
    """Against damages made up so that all tensors have 1 each as they are, and the last would have less with a bit less."""
    recipe = told("fisher", {"target_bits": 3})
    converted = convert(network(), recipe)
    gates = Gates(converted, recipe, make_budget(converted, recipe), 100, 8)
    gates.start()
    before = {t.name: t.quantizer.bits[0] for t in converted.tensors}
    for tensor in converted.tensors:
        tensor.quantizer.levels.data += 1.5  # as training would
    trained = {t.name: t.quantizer.levels.clone() for t in converted.tensors}
    last, *others = (t for t in reversed(converted.tensors) if not t.fixed)
    choices = []
    for tensor in converted.tensors:
        costs = {
            s: cost_of(converted, {**before, tensor.name: s})
            for s in range(tensor.min_bits, tensor.max_bits + 1)
        }
        choices.append(
            BitOptions(
                tensor.name, costs, {s: 1.0 if s == before[tensor.name] else 9.0 for s in costs}
            )
        )
    chosen = next(c for c in choices if c.name == last.name)
    chosen.damage[before[last.name] - 1] = 1 - len(choices) * (1 - share)
    gates._choices = lambda: choices  # type: ignore[method-assign]
    gates.limit = lambda step: sum(c.cost[before[c.name]] for c in choices)  # type: ignore[method-assign]
    gates.before_step(min(gates.looks_at))
    assert last.quantizer.bits == (before[last.name] - trades,)
    assert last.quantizer.levels.equal(trained[last.name]) != trades
    assert all(
        t.quantizer.levels.equal(trained[t.name]) and t.quantizer.bits == (before[t.name],)
        for t in others
    )


class Buffered(nn.Module):
    """Keeps some of what passes: bytes that the file holds and that nobody knew of before a forward pass."""

    def __init__(self, grows: str) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grows == "once":
            self.seen = torch.zeros(300)
        elif (self.grows == "in training" and self.training) or (
            self.grows == "in evaluation" and not self.training
        ):
            self.seen = torch.cat([self.seen, torch.zeros(20)])
        return x


def file_bytes(converted: QuantizedModel) -> int:
    """All tensors of the file, by what is frozen into it."""
    final = freeze(converted)
    inputs = sum(
        (len(a["levels"]) if len(a["levels"]) < 256 else 0) + 6 for a in final["activations"]
    )
    return (
        cost_of(converted)
        + inputs
        + sum(value.numel() * value.element_size() for value in final["floats"].values())
    )


@pytest.mark.parametrize("grows", ["once", "in training"])
def test_buffers_that_a_forward_pass_makes_are_in_the_budget(grows: str) -> None:
    recipe = told("fisher", {"target_size": "7kB"}, weights={"min_bits": 2})
    finished, _ = run(recipe, 8, nn.Sequential(*network(), Buffered(grows)))
    finished.gates.check_kept()
    assert len(finished.model[-1].seen) >= 200
    assert file_bytes(finished.converted) <= 7000
    report = build_report(
        finished.converted, finished.gates.budget, accuracy=None, source=SOURCE, run=RUN
    )
    assert report.totals.bytes == file_bytes(finished.converted)
    assert grows != "once" or report.totals.bytes > 0.98 * 7000
    with pytest.raises(BudgetError, match=r"The largest there: .*, 10.seen in float \(1,200\)"):
        run(
            told("fisher", {"target_size": "4kB"}, weights={"min_bits": 2}),
            1,
            nn.Sequential(*network(), Buffered("once")),
        )


def test_a_network_that_outgrows_its_budget_while_it_is_evaluated_is_refused() -> None:
    finished, _ = run(
        told("fisher", {"target_size": "7kB"}),
        2,
        nn.Sequential(*network(), Buffered("in evaluation")),
    )
    finished.gates.check_kept()
    evaluate(finished.model, finished.data)
    with pytest.raises(
        DDQError, match=r"bytes left to them. The network's buffers grew while it ran"
    ):
        finished.gates.check_kept()


def test_the_input_of_a_layer_that_is_never_called_costs_nothing() -> None:
    model = network()
    model.unused = nn.Identity()
    model.unused.layer = nn.Linear(70, 70)
    unconverted = deepcopy(model)
    finished, _ = run(told("fisher", {"target_size": "9kB"}, activations={"bits": 4}), 2, model)
    report = build_report(
        finished.converted, finished.gates.budget, accuracy=None, source=SOURCE, run=RUN
    )
    assert len(report.activations) == 5
    assert report.totals.bytes == file_bytes(finished.converted)
    assert 0.98 * 9000 < report.totals.bytes <= 9000
    least = cost_of(finished.converted, {t.name: t.min_bits for t in finished.converted.tensors})
    least += report.totals.kept_bytes
    finished, _ = run(
        told("fisher", {"target_size": f"{least}"}, activations={"bits": 4}),
        2,
        deepcopy(unconverted),
    )
    assert file_bytes(finished.converted) == least
    with pytest.raises(BudgetError, match=f"smallest reachable size is {least:,} bytes"):
        run(
            told("fisher", {"target_size": f"{least - 1}"}, activations={"bits": 4}), 2, unconverted
        )


def test_the_papers_gates_that_close_too_many_are_opened_again() -> None:
    recipe = told(
        "paper", {"target_bits": 4}, gates={"freeze": 0.6, "lr": 1.0, "init": 1e-3, "alpha": -10.0}
    )
    running = trainer(network(), recipe, 10, random_data())
    used = []
    after_backward = running.gates.after_backward

    def watched(step: int, loss: float) -> None:
        after_backward(step, loss)
        used.append(running.gates.cost() / (running.gates.budget.limit or 1))

    running.gates.after_backward = watched
    running.run(lambda metrics: None, lambda: None)
    assert used[5] < 0.7
    assert used[6] > 0.98


def test_channels_whose_bits_differ_are_opened_and_closed_too() -> None:
    recipe = told("paper", {"target_bits": 6}, weights={"granularity": "channel"})
    converted = convert(nn.Sequential(nn.Flatten(), nn.Linear(512, 16)), recipe)
    gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)
    weight = converted.tensors[0]
    weight.quantizer.refit(weight.parameter, (8, *[3] * 15))
    gates._open_what_fits()
    assert_kept(converted, gates.budget.limit or 0, used=True)
    assert gates.cost() > 0.9 * (gates.budget.limit or 0)
    weight.quantizer.refit(
        weight.parameter, (7, *[8] * 15)
    )  # with tables of 2^7, 7 bits cost more than 8 do
    gates.budget = replace(gates.budget, limit=cost_of(converted, {"1.weight": 8, "1.bias": 8}))
    gates._close_what_is_over()
    assert weight.quantizer.bits == (8,) * 16


@pytest.mark.parametrize("frozen", [5, 8])
def test_a_frozen_layer_gets_about_the_bits_that_it_would_get_otherwise(frozen: int) -> None:
    """Its gradients are not measured; one that is never called has none, and gets what the others leave."""
    model = network()
    model.unused = nn.Identity()
    model.unused.layer = nn.Linear(128, 40)
    recipe = told("fixed", {"target_bits": 3})
    free, _ = run(recipe, 1, deepcopy(model))
    model[frozen].requires_grad_(False)
    held, _ = run(recipe, 1, model)
    before, after = (
        {t.name: t.quantizer.bits[0] for t in r.converted.tensors} for r in (free, held)
    )
    assert f"{frozen}.weight" not in held.gates.fisher
    assert abs(before[f"{frozen}.weight"] - after[f"{frozen}.weight"]) <= 1
    assert after["unused.layer.weight"] == 1


def test_weights_beyond_the_square_root_of_float32_are_weighed_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.Linear(40, 10))
    model[1].weight.data *= 1e25
    converted = convert(model, recipe := told("fixed", {"target_bits": 4}))
    gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)
    gates.start()
    assert_kept(converted, gates.budget.limit or 0, used=True)


@pytest.mark.parametrize("weights", ["zeros", "ternary", "nine tenths zero"])
@pytest.mark.parametrize("rule", ["fisher", "fixed"])
@pytest.mark.parametrize("bits", [3.0, 8.2])
def test_weights_that_few_levels_hold_leave_no_bytes_idle(
    weights: str, rule: str, bits: float
) -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.rand(parameter.shape)
            kept = {
                "zeros": 0 * random,
                "ternary": parameter.sign() * (random < 0.6),
                "nine tenths zero": random < 0.1,
            }
            parameter.mul_(kept[weights])
    finished, _ = run(told(rule, {"target_bits": bits}), 3, model)
    assert_kept(finished.converted, finished.gates.budget.limit or 0, used=True)


def error_by_channel(weight: torch.Tensor, bits: int) -> float:
    """The squared error of levels fitted to each channel."""
    fitted = DDQuantizer.from_tensor(weight, bits, channel_axis=0)
    return float((fitted(weight) - weight).detach().double().square().sum())


def test_of_channels_with_levels_each_the_damage_is_that_of_their_own_levels() -> None:
    """Some of 40 channels stand for all; their scales differ by a thousand, which one set of levels would feel."""
    recipe = told("fixed", {"target_bits": 6}, weights={"granularity": "channel"})
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 40), nn.Linear(40, 10))
    scales = torch.logspace(-3, 0, 40)[
        torch.randperm(40, generator=torch.Generator().manual_seed(1))
    ]
    model[1].weight.data *= scales[:, None]
    converted = convert(model, recipe)
    gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)
    weight = converted.tensors[0].parameter.detach()
    choice = gates._choices()[0]
    for s in (2, 3, 4):
        assert choice.damage[s] == pytest.approx(error_by_channel(weight, s) / 2, rel=0.2)


@pytest.mark.parametrize("seed", range(6))
def test_channels_of_zeros_do_not_stand_for_the_others(seed: int) -> None:
    recipe = told("fixed", {"target_bits": 4}, weights={"granularity": "channel"})
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64))
    model[1].weight.data[torch.randperm(64, generator=torch.Generator().manual_seed(seed))[6:]] = 0
    converted = convert(model, recipe)
    choice = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)._choices()[0]
    weight = converted.tensors[0].parameter.detach()
    assert choice.damage[2] == pytest.approx(error_by_channel(weight, 2) / 2, rel=0.05)


@pytest.mark.parametrize("every", [2, 3, 4, 8])
def test_regular_patterns_of_channels_do_not_hide(every: int) -> None:
    """Pruned filters, or the gates of a recurrent layer, come at equal distances."""
    recipe = told("fixed", {"target_bits": 4}, weights={"granularity": "channel"})
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64))
    model[1].weight.data[::every] = 0
    converted = convert(model, recipe)
    choice = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)._choices()[0]
    weight = converted.tensors[0].parameter.detach()
    assert choice.damage[2] == pytest.approx(error_by_channel(weight, 2) / 2, rel=0.2)


def test_bits_go_where_the_loss_feels_them() -> None:
    """The first rule of the trade: of two equal layers, the one with the larger gradients gets more bits."""
    model = network()
    recipe = told("fixed", {"target_bits": 3})
    converted = convert(model, recipe)
    gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)
    names = [t.name for t in converted.tensors if t.kind != "bias"]
    gates.seen = 1
    for strong in ("5.weight", "8.weight"):
        gates.fisher = {name: 1.0 if name == strong else 1e-4 for name in names}
        gates.start()
        bits = {t.name: t.quantizer.bits[0] for t in converted.tensors}
        assert bits[strong] > bits["8.weight" if strong == "5.weight" else "5.weight"]
        assert_kept(converted, gates.budget.limit or 0, used=True)


@pytest.mark.parametrize("rule", ["fisher", "paper", "fixed"])
def test_the_state_survives_a_round_trip(rule: str) -> None:
    recipe = told(rule, {"target_bits": 3})
    running, _ = run(recipe, 7)
    file = io.BytesIO()
    torch.save(running.gates.state(), file)
    fresh = convert(network(), recipe)
    gates = Gates(fresh, recipe, make_budget(fresh, recipe), 7, 8)
    file.seek(0)
    gates.load(torch.load(file, weights_only=True))
    assert gates.state() == running.gates.state()
    assert gates.cost() == running.gates.cost()
    assert bits_in_force(fresh) == bits_in_force(running.converted)
    assert any(t.quantizer.correction > 0 for t in fresh.tensors)
    assert [t.quantizer.correction for t in fresh.tensors] == [
        t.quantizer.correction for t in running.converted.tensors
    ]


def test_the_fisher_is_the_mean_of_squared_gradients() -> None:
    recipe = told("fisher", None)
    converted = convert(network(), recipe)
    gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)
    expected = dict.fromkeys((t.name for t in converted.tensors), 0.0)
    for scale in (1.0, 3.0):
        for tensor in converted.tensors:
            tensor.parameter.grad = scale * torch.randn(tensor.shape)
            expected[tensor.name] += float(tensor.parameter.grad.double().square().mean()) / 2
        gates.watch()
    assert gates.fisher == pytest.approx(expected, rel=1e-5)


class NoiseShard(RandomBatches):
    """What one of `processes` sees of batches of noise, with labels that say nothing."""

    def __init__(self, rank: int, processes: int) -> None:
        super().__init__(count=16, size=64)
        self.rank, self.processes = rank, processes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in super().epoch(epoch, start):
            noise = torch.randn(
                x.shape, generator=torch.Generator().manual_seed(int(x.sum() * 1000) % 2**31)
            )
            yield noise[self.rank :: self.processes], y[self.rank :: self.processes]


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_calibrate_to_the_fisher_of_one(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients over a part of a batch have more noise, which is most of their square where nothing can be learned."""
    recipe = told("fisher", None)

    def fisher(rank: int, count: int) -> dict[str, float]:
        monkeypatch.setattr(distributed, "shard", lambda: Shard(rank, count))
        converted = convert(network(), recipe)
        gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 64)
        calibrate(converted, replace(random_data(), train=NoiseShard(rank, count)), 16, gates.watch)
        return gates.fisher

    whole, parts = fisher(0, 1), [fisher(rank, processes) for rank in range(processes)]
    ratios = [statistics.mean(part[name] for part in parts) / whole[name] for name in whole]
    assert 0.75 < statistics.median(ratios) < 1.25, ratios


@pytest.mark.parametrize("count", ["bytes", "eqn6"])
def test_the_papers_gates_follow_the_gradient_of_the_budgets_own_measure(count: str) -> None:
    """Eqn (7) with respect to the last open gate: -alpha * loss * what closing it saves / what all tensors cost."""
    recipe = told(
        "paper", {"target_bits": 3.3, "count": count}, gates={"lr": 1.0, "init": 0.5, "alpha": -0.3}
    )
    converted = convert(network(), recipe)
    gates = Gates(converted, recipe, make_budget(converted, recipe), 10, 8)
    free = [t for t in converted.tensors if not t.fixed]
    for tensor in free:
        tensor.quantizer.gate_logits.grad = torch.zeros_like(tensor.quantizer.gate_logits)
    whole = {t.name: t.max_bits for t in converted.tensors}
    cost = cost_of(converted, whole, count == "eqn6")
    gates.after_backward(1, loss=2.0)
    for tensor in free:
        saved = cost - cost_of(converted, {**whole, tensor.name: 7}, count == "eqn6")
        expected = sorted([0.5] * 7 + [0.5 - 0.3 * 2.0 * saved / cost], reverse=True)
        assert tensor.quantizer.gate_logits[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_papers_gates_close_while_the_budget_is_exceeded() -> None:
    """With steps of the size of the logits, Eqn (7)'s own gradient closes gates before the freeze."""
    recipe = told(
        "paper", {"target_bits": 2}, gates={"freeze": 1.0, "lr": 1.0, "init": 1e-3, "alpha": -1.0}
    )
    _, history = run(recipe, 20)
    assert history[0] != history[-2]
    assert sum(history[-2]) < sum(history[0])
