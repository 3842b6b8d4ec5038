"""Figures of a run over time: what is drawn of metrics and snapshots, and damaged ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from made_run import make_run
from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.errors import DDQError
from ddqcli.inspection.run_figures import RunFigure, draw_run
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import Run

FIGURES = (
    "bits_over_time_figure",
    "probabilities_over_time_figure",
    "loss_over_time_figure",
    "error_over_time_figure",
    "levels_over_time_figure",
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Collect the arguments of each figure in place of drawing it."""
    arguments: dict[str, tuple[Any, ...]] = {}

    def collect(name: str, *args: Any) -> Figure:
        arguments[name] = args
        return Figure()

    for name in FIGURES:
        monkeypatch.setattr(plots, name, lambda *args, name=name: collect(name, *args))
    return arguments


def draw(run: Run) -> list[RunFigure]:
    report = run.report()
    return draw_run(run, [row for row in report.layers if row.kind != "bias"], report.course)


@pytest.mark.parametrize(("entries", "each"), [(4000, 10), (585, 2), (400, 1)])
def test_long_runs_are_thinned_to_what_a_picture_can_show(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]], entries: int, each: int
) -> None:
    run = make_run(tmp_path / "run", 1)
    line = next(entry for entry in run.metrics() if "loss" in entry)
    lines = ({**line, "step": 10 * k, "loss": float(k)} for k in range(1, entries + 1))
    (run.path / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in lines))
    draw(run)
    steps, loss = drawn["loss_over_time_figure"][:2]
    means = [fmean(range(k + 1, min(k + each, entries) + 1)) for k in range(0, entries, each)]
    assert loss == pytest.approx(means)  # as smooth at the end as at the start
    assert steps == pytest.approx([10 * mean for mean in means])
    bit_steps = drawn["bits_over_time_figure"][0]
    assert (bit_steps[0], bit_steps[-1], len(bit_steps)) == (10, 10 * entries, 400)


def test_looks_and_the_delivered_step_are_drawn_over_the_loss(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    run = make_run(tmp_path / "run")
    draw(run)
    looks, delivered, metric, frozen = drawn["loss_over_time_figure"][3:]
    assert [step for step, _, _ in looks] == [0, 20, 40, 60, 80, 100]
    assert looks[0] == (0, 0.12, 5)
    assert (delivered, metric, frozen) == (80, "accuracy, %", None)


def test_the_freeze_of_batch_norm_is_drawn_and_said(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    text = "".join(f"{json.dumps({**line, 'batch_norm_step': 77})}\n" for line in lines)
    (run.path / "metrics.jsonl").write_text(text)
    captions = {figure.stem: figure.caption for figure in draw(run)}
    assert drawn["loss_over_time_figure"][-1] == 77
    assert "At step 77, BatchNorm's statistics" in captions["loss"]


def test_the_dbps_of_a_run_of_sdq_are_drawn_until_they_freeze(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    run = make_run(tmp_path / "run", 3)
    names = ["block1.conv.weight", "block3.conv.weight"]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            sampled = names if line["step"] <= 30 else names[1:] if line["step"] <= 50 else []
            line["probabilities"] = dict.fromkeys(sampled, line["step"] / 100)
    (run.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert "dbps-over-time" in [drawn.stem for drawn in draw(run)]
    steps, shown, table, bits = drawn["probabilities_over_time_figure"]
    assert steps == [10, 20, 30, 40, 50]
    assert shown == names
    assert [row[1] for row in table] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [row[0] for row in table[:3]] == [0.1, 0.2, 0.3]
    assert all(row[0] != row[0] for row in table[3:])  # NaN
    assert bits[0] == [max(7.5, entry) for entry in (2, 4)]


@pytest.mark.parametrize(("count", "target"), [("bytes", 3.0), ("eqn6", None)])
def test_a_target_is_drawn_if_it_counts_stored_bits(
    tmp_path: Path,
    drawn: dict[str, tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    count: str,
    target: float | None,
) -> None:
    recipe = Recipe.model_validate({"budget": {"target_bits": 3, "count": count}})
    monkeypatch.setattr(Run, "recipe", lambda self: recipe)
    draw(make_run(tmp_path / "run"))
    assert drawn["bits_over_time_figure"][-1] == target


@pytest.mark.usefixtures("drawn")
def test_a_run_that_was_not_trained_has_no_figures_over_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = [line for line in (run.path / "metrics.jsonl").read_text().splitlines()][:2]
    (run.path / "metrics.jsonl").write_text("\n".join(first) + "\n")
    assert all(json.loads(line)["step"] == 0 for line in first)
    assert draw(run) == []


@pytest.mark.usefixtures("drawn")
def test_levels_by_channel_are_not_drawn(tmp_path: Path) -> None:
    stems = [drawn.stem for drawn in draw(make_run(tmp_path / "run", axis=0))]
    assert stems == ["bits-over-time", "loss", "error-over-time"]


@pytest.mark.parametrize(
    "fault",
    [
        '{"step": 10, "loss": 1}',
        '{"step": 10, "levels": {}, "error": {}}',
        '{"step": 1, "levels": 2}',
    ],
)
def test_metrics_that_lack_something_are_refused(tmp_path: Path, fault: str) -> None:
    run = make_run(tmp_path / "run", 1)
    again = fault.replace('"step": 1', '"step": 2')
    (run.path / "metrics.jsonl").write_text(f"{fault}\n{again}\n")
    with pytest.raises(DDQError, match=r"metrics\.jsonl is damaged"):
        draw(run)
