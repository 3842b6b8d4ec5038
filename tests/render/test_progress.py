"""Progress of `ddq finetune` without a terminal."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from ddqcli.render.progress import ProgressBar, ProgressReporter
from ddqcli.runs.evaluation import Metric
from ddqcli.training.metrics import Look, StepMetrics


def step(train_accuracy: float) -> StepMetrics:
    return StepMetrics(
        step=30,
        steps=30,
        epoch=1,
        loss=0.0312,
        train_accuracy=train_accuracy,
        lr=0.1,
        average_bits=3.98,
        seconds=3.0,
        bits={},
        probabilities={},
    )


def test_the_last_step_shows_the_latest_accuracy_on_held_out_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = step(98.4)
    with ProgressReporter() as progress:
        progress.step(last)
        progress.look(Look(20, 0.05, 96.0))
        progress.look(Look(30, 0.04, 97.2))
        progress.step(last)
    assert capsys.readouterr().err.splitlines() == [
        "step 30/30: train loss 0.031, 3.98 bits, 0:03 elapsed, 0:00 left",
        "step 30/30: train loss 0.031, held-out loss 0.040, held-out accuracy 97.20 %, 3.98 bits, "
        "0:03 elapsed, 0:00 left",
    ]


def test_a_bar_fits_80_columns_and_shows_the_figures_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(file=StringIO(), width=80, force_terminal=True, no_color=True)
    monkeypatch.setattr("ddqcli.render.progress.err", console)
    bar = ProgressBar()
    bar.show("train", 30, 1200, figures := "train loss 0.031, held-out accuracy 97.20 %")
    with console.capture() as capture:
        console.print(*bar.get_renderables())
    first, second = capture.get().rstrip("\n").splitlines()[:2]
    assert first.startswith("train ╸")
    assert "30/1200 0:00 elapsed" in first
    assert second.strip() == figures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A bar's time, its last element."""
    console = Console(file=StringIO(), width=80, force_terminal=True, no_color=True)
    monkeypatch.setattr("ddqcli.render.progress.err", console)
    now = [0.0]
    monkeypatch.setattr(console, "get_time", lambda: now[-1])
    return now


def texts(bar: ProgressBar) -> list[tuple[str, float, float]]:
    """Return description, done and elapsed seconds of what the bar shows."""
    return [(task.description, task.completed, task.elapsed or 0) for task in bar.tasks]


def test_work_that_is_done_leaves_the_bar(clock: list[float]) -> None:
    bar = ProgressBar()
    for done in range(1, 12):
        bar.show("evaluate", done, 12)
    assert texts(bar) == [("evaluate", 11, 0)]
    bar.show("evaluate", 12, 12)
    assert texts(bar) == []


def test_each_pass_has_a_clock_of_its_own(clock: list[float]) -> None:
    bar = ProgressBar()
    bar.show("evaluate", 1, 12)
    clock.append(13.0)
    bar.show("evaluate", 2, 12)
    assert texts(bar) == [("evaluate", 2, 13)]
    bar.show("evaluate", 1, 12)  # begun again
    assert texts(bar) == [("evaluate", 1, 0)]
    bar.show("evaluate", 12, 12)
    clock.append(50.0)
    bar.show("evaluate", 1, 12)
    assert texts(bar) == [("evaluate", 1, 0)]


def test_in_a_sweep_the_bar_names_the_target(clock: list[float]) -> None:
    progress = ProgressReporter()
    progress.bar = ProgressBar()
    progress.target("4 bits")
    progress.progress("compensate", 3, 8)
    assert texts(progress.bar) == [("4 bits: compensate", 3, 0)]


def test_another_metric_is_shown_with_its_name_and_unit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressReporter() as progress:
        progress.judged_by(Metric(name="PSNR", unit="dB"))
        progress.look(Look(30, 0.04, 31.25))
        progress.step(step(30.5))
    assert capsys.readouterr().err.splitlines() == [
        "step 30/30: train loss 0.031, held-out loss 0.040, held-out PSNR 31.25 dB, 3.98 bits, "
        "0:03 elapsed, 0:00 left"
    ]
