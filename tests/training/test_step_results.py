"""Off the CPU, results of steps are read a few steps later: no step waits, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import RandomBatches, random_data, trainer
from tiny_training import STEPS, begin, differences, finish, network, recipe, stored
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddqcli.data.augment import normalize_images
from ddqcli.errors import DDQError
from ddqcli.training.step_results import StepResults
from ddqcli.training.trainer import Trainer

RUNS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "paper": {"gates": {"rule": "paper", "lr": 1e-2, "init": 1e-3, "alpha": -1.0}},
    "sdq": {"method": "sdq"},
    "inputs at 8 bits": {"activations": {"bits": 8}},
    "inputs with learned levels": {"activations": {"bits": 3}},
    "by channel": {"weights": {"granularity": "channel"}},
    "uniform levels": {"weights": {"levels": "uniform"}},
    "power of two": {"weights": {"levels": "power_of_two", "max_bits": 4}},
    "bfloat16, adamw": {
        "train": {"precision": "bfloat16", "optimizer": "adamw", "lr": 1e-3},
        "activations": {"bits": 8},
    },
    "distillation, bin regularization": {
        "train": {"distill": {"weight": 0.5}, "bin_regularization": 0.1}
    },
}


def deferred(settings: dict[str, Any], **sizes: Any) -> Trainer:
    running = begin(recipe(**copy.deepcopy(settings)), **sizes)
    running.reads_each_step = False
    return running


# ---- what a user gets is the same


@pytest.mark.parametrize("name", ["fisher", "paper", "sdq"])
def test_a_run_that_reads_later_ends_bit_for_bit_the_same(name: str) -> None:
    at_once, later = begin(recipe(**copy.deepcopy(RUNS[name]))), deferred(RUNS[name])
    one, other = finish(at_once), finish(later)
    assert [(m.step, m.loss, m.train_accuracy) for m in one] == [
        (m.step, m.loss, m.train_accuracy) for m in other
    ]
    assert not differences(at_once.state(), later.state())


class Infinite(RandomBatches):
    """One value of step 6's batch is infinite."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (x, y) in enumerate(super().epoch(epoch, start), start):
            if (epoch, number) == (1, 1):
                x[0, 0, 0, 0] = float("inf")
            yield x, y


def error_of(running: Trainer) -> DDQError:
    with pytest.raises(DDQError) as raised:
        finish(running)
    return raised.value


@pytest.mark.parametrize("fault", ["learning rate", "batch"])
def test_a_step_that_fails_is_told_as_if_it_had_been_read_at_once(fault: str) -> None:
    settings = {"train": {"lr": 1e30}} if fault == "learning rate" else {}
    runs = []
    for reads_each_step in (True, False):
        data = random_data()
        if fault == "batch":
            data = replace(data, train=Infinite())
        running = trainer(network(), recipe(**copy.deepcopy(settings)), STEPS, data)
        running.reads_each_step = reads_each_step
        runs.append((error_of(running), running))
    (one, at_once), (other, later) = runs
    assert (type(one), str(one)) == (type(other), str(other))
    assert ("The batch at step 6 of 11 holds" in str(one)) == (fault == "batch")
    assert later.step == at_once.step
    # The updates after it were skipped.
    assert not differences(*(stored(dict(r.model.named_parameters())) for r in (later, at_once)))


def test_a_failure_that_does_not_come_again_is_told_with_its_step() -> None:
    running, calls = deferred({}), []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return torch.nn.functional.cross_entropy(output, y) * (
            float("nan") if len(calls) == 4 else 1
        )

    running.forward.data = replace(running.data, loss=loss)
    assert "The loss became nan, or a gradient not finite, at step 4 of 11" in str(
        error_of(running)
    )
    assert running.restart_from_best(0.1)
    finish(running)
    assert all(value.isfinite().all() for value in running.model.state_dict().values())


def test_after_a_failure_at_its_very_step_the_best_state_is_loaded_too() -> None:
    running = begin(recipe())
    running.look()
    assert running.best_state.best is not None
    assert running.best_state.best.step == running.step
    running.model[1].running_mean.fill_(float("nan"))  # as a forward pass that diverged leaves it
    assert running.restart_from_best(0.1)
    assert running.model[1].running_mean.isfinite().all()


def test_only_several_ranks_judge_a_step_by_its_gradient_alone() -> None:
    nan, one = torch.tensor(float("nan")), torch.ones(1)
    for judge_loss in (True, False):
        results = StepResults(torch.device("cpu"), judge_loss=judge_loss)
        results.add(1, nan, [one])
        (result,) = results.read()
        assert results.is_finite(result) == (not judge_loss) == (results.failed.item() == 0)
        results.add(2, one[0], [nan[None]])
        results.add(3, one[0], [one])
        assert [results.is_finite(r) for r in results.read()] == [False, True]
        assert results.failed.item() == 1
        assert results.read() == []


# ---- no step waits for the device


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a value from the device, or what copies one to it from Python."""

    REFUSED = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.REFUSED, func
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Refuse to wait: by the operators that would, and on CUDA by PyTorch's own check."""
    if device == "cpu":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("paper", "sdq")])
def test_no_step_waits_for_the_device(name: str, device: str) -> None:
    running, step = deferred(RUNS[name], device=device), Trainer._train_step
    free = []

    def watched(x: Tensor, y: Tensor) -> None:
        if running.step == 0 or running.gates.reads_device(running.step):  # bits are new
            step(running, x, y)
            return
        with no_waiting(device):
            step(running, x, y)
        free.append(running.step)

    running._train_step = watched  # type: ignore[method-assign]
    finish(running)
    assert len(free) >= STEPS - 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_normalizing_a_batch_does_not_wait_either(device: str) -> None:
    pixels = torch.arange(2 * 4 * 5 * 3).view(2, 4, 5, 3).to(torch.uint8)
    images, mean, std = pixels.to(device), *torch.rand(2, 3).to(device)
    with no_waiting(device):
        found = normalize_images(images, mean, std)
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - mean[:, None, None].cpu()) / std[
        :, None, None
    ].cpu()
    torch.testing.assert_close(found.cpu().double(), expected)


def test_waiting_is_noticed() -> None:
    for wait in (lambda: float(torch.ones(1)), lambda: torch.tensor([1.0, 2.0])):
        with pytest.raises(AssertionError), NoWaiting():
            wait()
