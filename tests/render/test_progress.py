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
