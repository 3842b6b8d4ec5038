"""Signals during training: the step ends, the state is saved, and nothing is lost."""

from __future__ import annotations

import os
import signal

import pytest
from tiny_training import STEPS, before_each_step, begin, differences, finish, recipe, stored

from ddqcli.errors import Interrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_end_of_the_step_and_saves(number: int, code: int) -> None:
    running, whole, resumed = (begin(recipe()) for _ in range(3))
    saved = []
    before_each_step(running, lambda step: step == 4 and os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as caught:
        running.run(
            lambda metrics: None, lambda look: None, lambda: saved.append(stored(running.state()))
        )
    assert caught.value.exit_code == code
    assert saved[-1]["step"] == 5
    resumed.load(saved[-1])
    finish(resumed)
    finish(whole)
    assert not differences(resumed.state(), whole.state())


def test_the_end_of_a_loaders_process_does_not_cut_the_step_in_which_a_signal_came() -> None:
    running, saved = begin(recipe()), []

    def stop_all(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGCHLD)

    def handler_of_torch(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    before_each_step(running, stop_all)
    handler = signal.signal(signal.SIGCHLD, handler_of_torch)
    try:
        with pytest.raises(Interrupted, match="Stopped at step 5 of 11"):
            running.run(lambda metrics: None, lambda look: None, lambda: saved.append(running.step))
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert saved[-1] == 5


@pytest.mark.parametrize("at", ["the last step's end", "a failure"])
def test_a_signal_that_no_step_handles_is_raised_when_training_ends(at: str) -> None:
    running = begin(recipe())

    def fail(step: int) -> None:
        if step == 4 and at == "a failure":
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("It broke.")

    def save() -> None:
        if running.step == STEPS:
            os.kill(os.getpid(), signal.SIGINT)

    before_each_step(running, fail)
    with pytest.raises(KeyboardInterrupt):
        running.run(lambda metrics: None, lambda look: None, save)
