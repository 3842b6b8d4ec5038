"""The training loop: a resumed run equals an undisturbed one, and what each step computes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import RandomBatches, random_data, trainer
from tiny_training import (
    STEPS,
    before_each_step,
    begin,
    differences,
    finish,
    finish_at_last,
    network,
    recipe,
    stored,
)
from torch import Tensor, nn

from ddqcli.errors import DataError, DDQError
from ddqcli.qat.model import quantizers
from ddqcli.training import session
from ddqcli.training.detect_augmentation import DetectedAugmentation
from ddqcli.training.divergence import Diverged
from ddqcli.training.run_state import FloatBaseline
from ddqcli.training.trainer import Trainer

# ---- resuming


RUNS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "falling budget": {"gates": {"descent": 0.5}},
    "paper": {"gates": {"rule": "paper", "lr": 1e-2, "init": 1e-3, "alpha": -1.0}},
    "fixed": {"gates": {"rule": "fixed"}},
    "sdq": {"method": "sdq"},
    "sdq, uniform levels": {
        "method": "sdq",
        "weights": {"levels": "uniform"},
        "gates": {"descent": 0.5},
    },
    "sdq by channel": {"method": "sdq", "weights": {"granularity": "channel"}},
    "no budget, inputs at 8 bits": {"budget": {}, "activations": {"bits": 8}},
    "inputs with learned levels": {"activations": {"bits": 3}},
    "by channel": {
        "weights": {"granularity": "channel", "max_bits": 5},
        "budget": {"target_bits": 4},
    },
    "uniform levels, held BatchNorm": {
        "weights": {"levels": "uniform"},
        "train": {"batch_norm": "held"},
    },
    "power of two, adamw": {
        "weights": {"levels": "power_of_two", "max_bits": 4},
        "train": {"optimizer": "adamw", "lr": 1e-3},
    },
    "compensated, distillation": {
        "train": {"compensate": True, "distill": {"weight": 0.5, "temperature": 2}}
    },
    "bfloat16": {"train": {"precision": "bfloat16"}, "activations": {"bits": 8}},
}
STOPS = (1, 4, 7, 8, STEPS - 1)  # an epoch ends at 4 and 8; gates freeze at 7, BatchNorm at 8


def states_at(running: Trainer, steps: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Run to the end; return the states that a kill would leave if it came after these steps."""
    states: dict[int, dict[str, Any]] = {}

    def keep(step: int) -> None:
        if step in steps:
            states[step] = stored(running.state())

    before_each_step(running, keep)
    finish(running)
    return states


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_as_an_undisturbed_one_bit_for_bit(name: str) -> None:
    settings = recipe(**copy.deepcopy(RUNS[name]))
    whole = begin(settings)
    for step, state in states_at(whole, STOPS if name in ("fisher", "sdq") else (6,)).items():
        assert state["step"] == step
        torch.manual_seed(4711)  # another process has other random numbers
        resumed = begin(settings)
        resumed.load(state)
        assert not differences(stored(resumed.state()), state)
        finish(resumed)
        assert not differences(resumed.state(), whole.state())


@pytest.mark.parametrize("name", ["fisher", "paper", "no budget, inputs at 8 bits", "by channel"])
def test_so_does_a_long_run_whose_kernels_are_compiled(name: str, monkeypatch) -> None:
    monkeypatch.setattr(session, "_COMPILE_FROM", 0)
    settings = recipe(**copy.deepcopy(RUNS[name]))
    whole = begin(settings)
    assert all(quantizer.use_compiled for quantizer in quantizers(whole.quantized))
    (state,) = states_at(whole, (6,)).values()
    resumed = begin(settings)
    resumed.load(state)
    finish(resumed)
    assert not differences(resumed.state(), whole.state())


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**9},
        {"step": "x"},
        {"step": math.inf},
        {"stages": [1]},
        {"stages": {"quantized": math.inf}},
        {"best": None},
        {"best": {"step": 1e308, "held_out_loss": 1.0, "held_out_accuracy": 50.0}},
        {"looks": [None]},
        {"best_state": "x"},
        {"best_state": {"model": {}, "gates": {}}},
        {"model": {}},
        {"gates": True},
    ],
    ids=str,
)
def test_a_state_of_another_form_is_refused_before_training(change: dict[str, Any]) -> None:
    running = begin(recipe())
    state = running.state() | change
    with pytest.raises(DDQError, match="The saved state does not fit this model"):
        running.load(state)


@pytest.mark.parametrize("augmentation", [{"fill": True}, {"fill": "x"}, {"flip": "x"}, 1])
def test_a_float_baseline_of_another_form_is_refused(augmentation: Any) -> None:
    baseline = FloatBaseline(99.0, DetectedAugmentation("mean", True), {"torch": "2"})
    assert FloatBaseline.from_state(baseline.state()) == baseline
    with pytest.raises(DDQError, match="not as this version of ddq writes it"):
        FloatBaseline.from_state(baseline.state() | {"augmentation": augmentation})


@pytest.mark.parametrize("compile_from", [0, math.inf], ids=["kernels in C", "PyTorch's"])
@pytest.mark.parametrize("name", ["fisher", "no budget, inputs at 8 bits"])
def test_torchs_default_type_changes_nothing(name: str, compile_from: float, monkeypatch) -> None:
    monkeypatch.setattr(session, "_COMPILE_FROM", compile_from)
    states = []
    for dtype in (torch.float32, torch.float64):
        net, teacher = network(), network().eval().requires_grad_(False)
        torch.set_default_dtype(dtype)
        try:
            settings = recipe(**copy.deepcopy(RUNS[name]))
            running = trainer(net, settings, STEPS, random_data(), teacher)
            finish(running)
        finally:
            torch.set_default_dtype(torch.float32)
        states.append(running.state())
    assert not differences(*states)


@pytest.mark.parametrize("method", ["ddq", "sdq"])
def test_a_run_resumed_after_its_return_to_the_best_state_ends_bit_for_bit_the_same(
    method: str,
) -> None:
    settings = recipe(method=method)
    whole, resumed = begin(settings), begin(settings)

    def diverge(step: int) -> None:
        if step == 9:
            raise Diverged("The loss became nan")

    before_each_step(whole, diverge)
    with pytest.raises(Diverged):
        finish(whole)
    assert whole.restart_from_best(0.1)
    del whole.gates.before_step  # the rule's own is back
    resumed.load(stored(whole.state()))
    for running in (whole, resumed):
        assert running.step < 9
        assert [look.step for look in running.best_state.looks][-1] == running.step
        finish(running)
    assert not differences(resumed.state(), whole.state())


class WithAuxiliaryHead(nn.Module):
    """Like GoogLeNet and Inception, calls one head in train mode only, so calibration misses it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.head, self.auxiliary = nn.Linear(128, 10), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(1)
        return self.head(x) + 0.3 * self.auxiliary(x) if self.training else self.head(x)


def test_a_resumed_run_leaves_the_inputs_in_float_that_calibration_did_not_reach() -> None:
    settings = recipe(activations={"bits": 8})
    whole, resumed = (
        trainer(WithAuxiliaryHead(), settings, STEPS, random_data()) for _ in range(2)
    )
    assert "auxiliary (input)" in whole.quantized.kept_float
    (state,) = states_at(whole, (5,)).values()
    resumed.load(state)
    finish(resumed)
    assert not differences(resumed.state(), whole.state())


@pytest.mark.parametrize("name", ["sdq", "inputs with learned levels"])
def test_the_same_seed_gives_the_same_result_and_another_seed_another(name: str) -> None:
    states, losses = [], []
    for seed in (0, 0, 1):
        running = begin(recipe(**copy.deepcopy(RUNS[name]), train={"seed": seed}))
        losses.append([m.loss for m in finish(running)])
        states.append(running.state())
    assert not differences(states[0], states[1])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]  # by dropout: the data know no seed


def test_checkpoints_come_every_save_every_steps_and_at_each_epochs_end() -> None:
    running = begin(recipe())
    saved: list[int] = []
    running.run(lambda metrics: None, lambda look: None, lambda: saved.append(running.step))
    assert saved == [3, 4, 6, 8, 9, 11]


# ---- what a step computes


def test_every_part_of_a_model_learns_and_the_loss_falls() -> None:
    running = begin(recipe(activations={"bits": 4}), steps=60)
    weights = [t for t in running.quantized.tensors if t.kind != "bias"]
    before = {name: value.clone() for name, value in running.model.state_dict().items()}
    metrics = finish_at_last(running)
    assert metrics[-1].loss < 0.8 * metrics[0].loss
    moved = {
        name
        for name, value in running.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    learned = {name for name in before if name.endswith(("original", "running_mean"))}
    learned |= {
        "0.input_quantizer.log2_scale",
        "3.input_quantizer.learned.levels",
        "7.input_quantizer.log2_scale",
    }
    learned |= {f"{t.name.replace('weight', 'parametrizations.weight')}.0.levels" for t in weights}
    assert learned <= moved


def test_metrics_report_step_epoch_learning_rate_and_stored_bits() -> None:
    running = begin(recipe(), steps=25)
    metrics = finish(running)
    assert [(m.step, m.epoch) for m in metrics] == [(10, 3), (20, 5), (25, 7)]
    assert [m.lr for m in metrics] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * n / 25)) / 2 for n in (9, 19, 24)]
    )
    last = metrics[-1]
    assert last.bits == {t.name: t.quantizer.bits[0] for t in running.quantized.tensors}
    sizes = {t.name: t.parameter.numel() for t in running.quantized.tensors}
    # Scale, zero point and gates; below 8 bits also the levels.
    tables = {name: 6 + (2**s if s < 8 else 0) for name, s in last.bits.items()}
    stored_bytes = sum(
        math.ceil(size * last.bits[name] / 8) + tables[name] for name, size in sizes.items()
    )
    assert last.average_bits == 8 * stored_bytes / sum(sizes.values())
    assert last.remaining == 0
    assert all(m.steps == 25 and 0 <= m.train_accuracy <= 100 and m.seconds > 0 for m in metrics)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step() -> None:
    running = begin(recipe(train={"lr": 1e30}))
    with pytest.raises(DDQError, match=r"at step [2-9] of 11"):
        finish(running)


# ---- data and BatchNorm


def test_a_run_without_batch_norm_reads_each_batch_once() -> None:
    data = replace(random_data(), held_out=RandomBatches())
    running = trainer(nn.Sequential(nn.Flatten(), nn.Linear(108, 10)), recipe(), 4, data)
    epoch, epochs_read = RandomBatches.epoch, []

    def counted(*args: Any) -> Iterator[Any]:
        epochs_read.append(args[1:])
        yield from epoch(*args)

    running.data.train.epoch = counted.__get__(running.data.train)  # type: ignore[method-assign]
    finish(running)
    assert epochs_read == [(0, 0)]


def test_data_that_end_too_early_are_refused() -> None:
    running = begin(recipe())
    running.data.train.epoch = lambda epoch, start: iter(())  # type: ignore[method-assign]
    with pytest.raises(DataError, match="Epoch 1 of the training data ended after 0 batches"):
        finish(running)


@pytest.mark.parametrize(
    ("share", "frozen_from"), [(0.75, 8), (0.1, 4), (0.8, 8), (0.9, 9), (1.0, 11)]
)
def test_batch_norm_freezes_at_its_statistics_over_bn_batches(
    share: float, frozen_from: int
) -> None:
    """Against float64 sums over the epoch after the last, with the weights of that moment."""
    running = begin(
        recipe(gates={"freeze": 0.2}, train={"bn_freeze": share, "bn_batches": 3, "epochs": 3})
    )
    conv, norm, before = running.model[0], running.model[1], {}

    def keep(step: int) -> None:
        values = (norm.running_mean, norm.running_var, conv.weight, conv.bias)
        before[step] = [value.detach().clone() for value in values]

    before_each_step(running, keep)
    metrics = finish_at_last(running)
    assert {entry.batch_norm_step for entry in metrics} == {frozen_from}
    weight, bias = (
        before[frozen_from][2:]
        if frozen_from < STEPS
        else (conv.weight.detach(), conv.bias.detach())
    )
    inputs = [x.double() for x, _ in list(running.data.train.epoch(3))[:3]]
    outputs = [
        nn.functional.conv2d(x, weight.double(), bias.double()).transpose(0, 1).flatten(1)
        for x in inputs
    ]
    mean = torch.stack([output.mean(1) for output in outputs]).mean(0)
    var = torch.stack([output.var(1, unbiased=True) for output in outputs]).mean(0)
    assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert torch.allclose(norm.running_var.double(), var, rtol=1e-4)
    assert norm.momentum == 0.1
    for step, (running_mean, running_var, *_) in before.items():
        frozen = torch.equal(running_mean, norm.running_mean) and torch.equal(
            running_var, norm.running_var
        )
        assert frozen == (step >= frozen_from), step


def test_held_statistics_have_no_step_at_which_they_freeze() -> None:
    metrics = finish(begin(recipe(train={"batch_norm": "held"})))
    assert {entry.batch_norm_step for entry in metrics} == {None}


def test_without_batches_the_running_statistics_freeze() -> None:
    running, means = begin(recipe(train={"bn_batches": 0})), []
    before_each_step(running, lambda step: means.append(running.model[1].running_mean.clone()))
    finish(running)
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(means)]
    assert changes == [True] * 8 + [False] * 2
