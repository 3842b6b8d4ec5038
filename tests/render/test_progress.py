"""Progress of `ddq finetune` without a terminal."""

from __future__ import annotations

import pytest

from ddqcli.render.progress import ProgressReporter
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
        "train 30/30: loss 0.031, 98.4 %, 3.98 bits, 0:00 left",
        "train 30/30: loss 0.031, 98.4 %, held-out 97.2 %, 3.98 bits, 0:00 left",
    ]


def test_another_metric_is_shown_with_its_name_and_unit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressReporter() as progress:
        progress.judged_by(Metric(name="PSNR", unit="dB"))
        progress.look(Look(30, 0.04, 31.25))
        progress.step(step(30.5))
    assert capsys.readouterr().err.splitlines() == [
        "train 30/30: loss 0.031, PSNR 30.5 dB, held-out PSNR 31.25 dB, 3.98 bits, 0:00 left"
    ]
