"""The training loop: what a resumed run shares with an undisturbed one, and what it computes."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import RandomBatches, random_data, trainer
from torch import Tensor, nn

from ddqcli.data.augment import Preprocess
from ddqcli.data.load import Data
from ddqcli.errors import DataError, DDQError, Interrupted
from ddqcli.recipe.schema import Recipe
from ddqcli.training.batch_norm import reestimate_batch_norm
from ddqcli.training.distillation import check_distillable, distillation
from ddqcli.training.trainer import StepMetrics, Trainer

STEPS = 11  # with 4 batches an epoch


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip


def told(**sections: Any) -> Recipe:
    gates = {"looks": 3, "freeze": 0.7, **sections.pop("gates", {})}
    train = {"lr": 0.05, "save_every": 3, "distill": {"weight": 0}, **sections.pop("train", {})}
    base = {"budget": {"target_bits": 3}, "gates": gates, "train": train, "data": {"batch_size": 8}}
    return Recipe.model_validate({**base, **sections})


def finish(running: Trainer, stop: int | None = None) -> list[StepMetrics]:
    """Run to the end, or until step `stop` as a kill would have it."""
    metrics: list[StepMetrics] = []
    if stop is None:
        running.run(metrics.append, lambda: None)
        return metrics

    class Killed(Exception):
        pass

    before_step = running.gates.before_step

    def killing(step: int) -> None:
        if step == stop:
            raise Killed
        before_step(step)

    running.gates.before_step = killing
    with pytest.raises(Killed):
        running.run(metrics.append, lambda: None)
    return metrics


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from the disk."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two states differ in any bit."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        return [
            d
            for n, (a, b) in enumerate(zip(one, other, strict=True))
            for d in differences(a, b, f"{path}.{n}")
        ]
    return [] if one == other else [path]


RUNS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "falling budget": {"gates": {"descent": 0.5}},
    "paper": {"gates": {"rule": "paper", "lr": 1e-2, "init": 1e-3, "alpha": -1.0}},
    "fixed": {"gates": {"rule": "fixed"}},
    "no budget": {"budget": {}},
    "inputs at 8 bits": {"activations": {"bits": 8}},
    "inputs with learned levels": {"activations": {"bits": 3}},
    "by channel": {
        "weights": {"granularity": "channel", "max_bits": 5},
        "budget": {"target_bits": 4},
    },
    "uniform levels": {"weights": {"levels": "uniform"}},
    "power of two": {"weights": {"levels": "power_of_two", "max_bits": 4}},
    "adamw": {"train": {"optimizer": "adamw", "lr": 1e-3}},
    "bfloat16": {"train": {"precision": "bfloat16"}, "activations": {"bits": 8}},
    "distillation": {"train": {"distill": {"weight": 0.5, "temperature": 2}}},
}


def begin(recipe: Recipe, steps: int = STEPS, seed: int = 0) -> Trainer:
    teacher = network().eval().requires_grad_(False)
    return trainer(network(seed), recipe, steps, random_data(), teacher)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_as_an_undisturbed_one_bit_for_bit(name: str) -> None:
    recipe = told(**copy.deepcopy(RUNS[name]))
    whole = begin(recipe)
    finish(whole)
    expected = whole.state()
    for stop in (1, 4, 7, 8, 9, STEPS - 1) if name == "fisher" else (6,):
        first = begin(recipe)
        finish(first, stop)
        saved = stored(first.state())
        assert saved["step"] == stop
        torch.manual_seed(4711)  # another process stands elsewhere in its random numbers
        second = begin(recipe)
        second.load(saved)
        assert not differences(stored(second.state()), saved)
        finish(second)
        assert not differences(second.state(), expected)


class WithAuxiliaryHead(nn.Module):
    """As GoogLeNet and Inception: one head is called while training and not in evaluation, where inputs are calibrated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.auxiliary = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(128, 10),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(1)
        return self.head(x) + 0.3 * self.auxiliary(x) if self.training else self.head(x)


def test_a_resumed_run_leaves_the_inputs_in_float_that_calibration_did_not_reach() -> None:
    recipe = told(activations={"bits": 8})
    whole, first, second = (
        trainer(WithAuxiliaryHead(), recipe, STEPS, random_data()) for _ in range(3)
    )
    assert "auxiliary (input)" in whole.converted.kept_float
    finish(whole)
    finish(first, 5)
    second.load(stored(first.state()))
    finish(second)
    assert not differences(second.state(), whole.state())


@pytest.mark.parametrize("name", ["fisher", "paper", "inputs with learned levels"])
def test_the_same_seed_gives_the_same_result_and_another_seed_another(name: str) -> None:
    states, losses = [], []
    for seed in (0, 0, 1):
        running = begin(told(**copy.deepcopy(RUNS[name]), **({"train": {"seed": seed}})))
        losses.append([m.loss for m in finish(running)])
        states.append(running.state())
    assert not differences(states[0], states[1])
    assert losses[0] == losses[1]
    assert differences(
        states[0]["model"], states[2]["model"]
    )  # through dropout alone: these data know no seed


def test_every_part_of_a_model_learns_and_the_loss_falls() -> None:
    running = begin(told(activations={"bits": 4}), steps=60)
    weights = [t for t in running.converted.tensors if t.kind != "bias"]
    before = {name: value.clone() for name, value in running.model.state_dict().items()}
    metrics = finish(running)
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


def test_the_metrics_say_what_went_on() -> None:
    running = begin(told(), steps=25)
    metrics = finish(running)
    assert [(m.step, m.epoch) for m in metrics] == [(10, 3), (20, 5), (25, 7)]
    assert [m.lr for m in metrics] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * n / 25)) / 2 for n in (9, 19, 24)]
    )
    last = metrics[-1]
    assert last.bits == {t.name: t.quantizer.bits[0] for t in running.converted.tensors}
    sizes = {t.name: t.parameter.numel() for t in running.converted.tensors}
    tables = {
        name: 6 + (2**s if s < 8 else 0) for name, s in last.bits.items()
    }  # scale, zero point, gates; levels
    stored = sum(
        math.ceil(size * last.bits[name] / 8) + tables[name] for name, size in sizes.items()
    )
    assert last.average_bits == 8 * stored / sum(sizes.values())
    assert last.remaining == 0
    assert all(m.steps == 25 and 0 <= m.train_accuracy <= 100 and m.seconds > 0 for m in metrics)


@pytest.mark.parametrize(
    ("share", "frozen_from"), [(0.75, 8), (0.1, 4), (0.8, 8), (0.9, 9), (1.0, 11)]
)
def test_batch_norm_freezes_at_its_statistics_over_the_batches_told(
    share: float, frozen_from: int
) -> None:
    """Against sums in float64 over the batches of the epoch after the last, with the weights of that moment."""
    running = begin(
        told(gates={"freeze": 0.2}, train={"bn_freeze": share, "bn_batches": 3, "epochs": 3})
    )
    before_step, seen = running.gates.before_step, {}
    conv, norm = running.model[0], running.model[1]

    def watched(step: int) -> None:
        seen[step] = [
            t.detach().clone()
            for t in (norm.running_mean, norm.running_var, conv.weight, conv.bias)
        ]
        before_step(step)

    running.gates.before_step = watched
    finish(running)
    weight, bias = (
        seen[frozen_from][2:] if frozen_from < STEPS else (conv.weight.detach(), conv.bias.detach())
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
    for step, (running_mean, running_var, *_) in seen.items():
        frozen = torch.equal(running_mean, norm.running_mean) and torch.equal(
            running_var, norm.running_var
        )
        assert frozen == (step >= frozen_from), step


def test_a_network_that_holds_its_batch_norm_fixed_keeps_its_statistics() -> None:
    class Fixed(nn.Sequential):
        def train(self, mode: bool = True) -> Fixed:
            super().train(mode)
            self[1].eval()
            return self

    running = trainer(Fixed(*network()), told(), STEPS, random_data())
    running.model[1].running_mean.fill_(0.5)
    finish(running)
    assert torch.equal(running.model[1].running_mean, torch.full((8,), 0.5))


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    reached, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = nn.ModuleDict({"reached": reached, "other": other})
    model.forward = reached.forward
    for norm in (reached, other):
        norm.running_mean.fill_(5)
    reestimate_batch_norm(model, random_data().train.epoch(0))
    assert other.running_mean.tolist() == [5, 5, 5]
    assert reached.running_mean.abs().max() < 2


@pytest.mark.parametrize("dead", [[1], [0, 2, 3], [0, 1, 2, 3]])
def test_a_constant_channel_gets_the_variance_of_its_layer_and_keeps_its_output(
    dead: list[int],
) -> None:
    """A ResNet-20's loss at 4/8 bits rose from 0.05 to 58 when the level 0 of such a channel moved by one step of the grid."""
    torch.manual_seed(0)
    conv, norm, other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(2)
    conv.weight.data[dead] = 0
    conv.bias.data.fill_(1.3)  # float32's rounding gives a constant some variance
    for drawn in (norm.weight, norm.bias):
        nn.init.uniform_(drawn)
    other.running_var[0] = 0
    model = nn.ModuleDict({"conv": conv, "norm": norm, "other": other})
    model.forward = lambda x: norm(conv(x.contiguous(memory_format=torch.channels_last)))
    reestimate_batch_norm(model, random_data().train.epoch(0))
    inputs = [x for x, _ in random_data().train.epoch(0)]
    var = torch.stack([conv(x).double().transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    live = torch.tensor([channel not in dead for channel in range(4)])
    usual = var[live].mean() if live.any() else 1.0
    assert torch.allclose(norm.running_var.double(), torch.where(live, var, usual), rtol=1e-4)
    assert other.running_var.tolist() == [0, 1]
    for channel in dead:
        assert torch.allclose(model.forward(inputs[0])[:, channel], norm.bias[channel], atol=1e-5)
        conv.weight.data[channel] = 0.01
        assert (model.forward(inputs[0])[:, channel] - norm.bias[channel]).abs().max() < 0.5


def test_a_run_without_batch_norm_reads_each_batch_once() -> None:
    running = trainer(nn.Sequential(nn.Flatten(), nn.Linear(108, 10)), told(), 4, random_data())
    epoch, read = RandomBatches.epoch, []

    def counted(*args: Any) -> Iterator[Any]:
        read.append(args[1:])
        yield from epoch(*args)

    running.data.train.epoch = counted.__get__(running.data.train)
    finish(running)
    assert read == [(0, 0)]


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (None, "no tensor"),
        (torch.zeros(4, 1), r"of shape \[4, 1\]"),
        (torch.zeros(4, 3, 2, 2), "of shape"),
        (torch.tensor([[0.0, -math.inf]]), "partly infinite"),
    ],
)
def test_outputs_that_cannot_be_distilled_are_refused(output: Tensor | None, kind: str) -> None:
    check_distillable({"output": torch.zeros(4, 2)})
    with pytest.raises(DataError, match=f"model's output is {kind}.*; set train.distill.weight=0"):
        check_distillable(None if output is None else {"output": output})


def test_without_batches_the_running_statistics_freeze() -> None:
    running = begin(told(train={"bn_batches": 0}))
    before_step, seen = running.gates.before_step, []

    def watched(step: int) -> None:
        seen.append(running.model[1].running_mean.clone())
        before_step(step)

    running.gates.before_step = watched
    finish(running)
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [True] * 8 + [False] * 2


def test_the_loss_is_that_of_hinton_et_al_beside_the_labels() -> None:
    """Against sums in float64; by default 0.9 of it at temperature 4, and none where the loss is the user's own."""
    x, y = next(random_data().train.epoch(0))
    own = dataclasses.replace(random_data(), own_loss=True)
    teacher = network(1).eval().requires_grad_(False)
    for settings, data, share, temperature in [
        ({}, random_data(), 0.9, 4.0),
        ({}, own, 0.0, 4.0),
        ({"weight": 0.3, "temperature": 2.0}, own, 0.3, 2.0),
    ]:
        running = trainer(network(), told(train={"distill": settings}), 5, data, teacher)
        output = torch.randn(len(y), 10, generator=torch.Generator().manual_seed(3))
        goal = (teacher(x).double() / temperature).softmax(1)
        divergence = (
            goal * (goal.log() - (output.double() / temperature).log_softmax(1))
        ).sum() / len(y)
        labels = -output.double().log_softmax(1)[torch.arange(len(y)), y].mean()
        expected = share * temperature**2 * divergence + (1 - share) * labels
        found = running._loss(output, y, running._target(x))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("flip", [True, False], ids=["mirrored", "as they are"])
def test_where_training_mirrors_images_the_target_is_the_same_for_an_image_and_its_mirror(
    flip: bool,
) -> None:
    augment = Preprocess([0.5] * 3, [0.5] * 3, torch.device("cpu"), flip=flip)
    teacher = network(1).eval().requires_grad_(False)
    data = dataclasses.replace(random_data(), augment=augment)
    running = trainer(network(), told(train={"distill": {}}), 5, data, teacher)
    x, _ = next(random_data().train.epoch(0))
    target, mirrored = running._target(x), running._target(x[:, :, :, [5, 4, 3, 2, 1, 0]])
    alone = teacher(x)
    assert target is not None
    assert mirrored is not None
    assert torch.allclose(target, mirrored, atol=1e-5) == flip
    assert torch.allclose(target, alone, atol=1e-5) != flip
    assert torch.allclose(target + target, alone + teacher(x.flip(3)), atol=1e-5) == flip


def test_distillation_is_exact_under_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (5 * torch.randn(64, 10, generator=generator)).bfloat16()
    output = (target + 0.2 * torch.randn(64, 10, generator=generator)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation(output, target, 4.0)
    found.backward()
    exact = output.detach().double().requires_grad_()
    goal = (target.double() / 4).softmax(1)
    expected = 16 * (goal * (goal.log() - (exact / 4).log_softmax(1))).sum() / 64
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert output.grad is not None
    assert exact.grad is not None
    assert (output.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize("flip", [False, True], ids=["as they are", "mirrored"])
def test_the_float_model_sees_the_input_that_a_network_changes_in_place(flip: bool) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.sub_(0.5).div_(0.2))  # type: ignore[no-any-return]

    teacher, seen = Normalised().eval().requires_grad_(False), []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    augment = Preprocess([0.5] * 3, [0.5] * 3, torch.device("cpu"), flip=flip)
    data = dataclasses.replace(random_data(), augment=augment)
    finish(trainer(Normalised(), told(train={"distill": {"weight": 1}}), 2, data, teacher))
    batches = itertools.islice(random_data().train.epoch(0), 2)
    given = [view for x, _ in batches for view in ((x, x.flip(3)) if flip else (x,))]
    assert [torch.equal(x, y) for x, y in zip(seen, given, strict=True)] == [True] * len(given)


def test_full_distillation_needs_no_labels() -> None:
    batches = RandomBatches()
    data = random_data()

    def no_loss(output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("the labels were asked for")

    recipe = told(train={"distill": {"weight": 1.0}})
    running = begin(recipe)
    running.data = Data(batches, batches, no_loss, data.metric, None, "no labels")
    assert finish(running)[-1].step == STEPS


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step() -> None:
    running = begin(told(train={"lr": 1e30}))
    with pytest.raises(DDQError, match=r"at step [2-9] of 11"):
        finish(running)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_end_of_the_step_and_saves(number: int, code: int) -> None:
    recipe = told()
    running, saved = begin(recipe), []
    before_step = running.gates.before_step

    def interrupted(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)
        before_step(step)

    running.gates.before_step = interrupted
    with pytest.raises(Interrupted) as caught:
        running.run(lambda metrics: None, lambda: saved.append(stored(running.state())))
    assert caught.value.exit_code == code
    assert saved[-1]["step"] == 5
    resumed, whole = begin(recipe), begin(recipe)
    resumed.load(saved[-1])
    finish(resumed)
    finish(whole)
    assert not differences(resumed.state(), whole.state())


def test_the_end_of_a_loaders_process_does_not_cut_the_step_in_which_a_signal_came() -> None:
    running, saved = begin(told()), []
    before_step = running.gates.before_step

    def stopped_together(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGCHLD)
        before_step(step)

    def torchs(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    running.gates.before_step = stopped_together
    before = signal.signal(signal.SIGCHLD, torchs)
    try:
        with pytest.raises(Interrupted, match="Stopped at step 5 of 11"):
            running.run(lambda metrics: None, lambda: saved.append(running.step))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert saved[-1] == 5


@pytest.mark.parametrize("at", ["the last step's end", "a failure"])
def test_a_signal_that_no_step_answers_comes_when_training_ends(at: str) -> None:
    running = begin(told())
    before_step = running.gates.before_step

    def failing(step: int) -> None:
        if step == 4 and at == "a failure":
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("It broke.")
        before_step(step)

    def save() -> None:
        if running.step == STEPS:
            os.kill(os.getpid(), signal.SIGINT)

    running.gates.before_step = failing
    with pytest.raises(KeyboardInterrupt):
        running.run(lambda metrics: None, save)


def test_states_are_saved_every_so_often_and_at_each_epochs_end() -> None:
    running, saved = begin(told()), []
    running.run(lambda metrics: None, lambda: saved.append(running.step))
    assert saved == [3, 4, 6, 8, 9, 11]
