"""Figures of a run: bits by layer, and bits, DBPs, loss, error and levels over time; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.errors import DDQError
from ddqcli.inspection.histograms import SHOWN_BINS, histogram_of, shown_counts
from ddqcli.inspection.trained_rows import run_tensors, short_kind
from ddqcli.runs.evaluation import Course, Metric
from ddqcli.runs.report import TensorRow
from ddqcli.runs.run import METRICS, Run

MAX_POINTS = 400  # along the step axis
LAYERS_WITH_LEVELS = 5


@dataclass(frozen=True)
class RunFigure:
    """A figure, the stem of its files, and a caption that says what it shows."""

    stem: str
    figure: Figure
    caption: str


def draw_bits(rows: Sequence[TensorRow], order: str = "network") -> RunFigure:
    """Draw the bit-width of each layer of a report."""
    figure = plots.bits_by_layer_figure(
        [row.name for row in rows],
        [short_kind(row.kind) for row in rows],
        [row.bits for row in rows],
    )
    caption = f"Bits of each layer's weights, in {order} order, without biases."
    return RunFigure("bits-by-layer", figure, caption)


def draw_run(
    run: Run, rows: Sequence[TensorRow], course: Course | None = None, metric: Metric | None = None
) -> list[RunFigure]:
    """Draw a run over its steps, for the weights `rows`, `course` and `metric` of its report.

    A run without steps has no figures. Raises DDQError for a damaged run.
    """
    names = [row.name for row in rows]
    try:
        metrics, snapshots = run.metrics(), run.snapshots()
        figures = []
        if metrics:
            figures.append(_draw_bits_over_time(run, metrics, names))
            figures += _draw_probabilities(metrics, names)
            figures.append(_draw_loss(metrics, run.looks(), course, metric or Metric()))
        return figures + (_draw_snapshots(run, snapshots, rows) if len(snapshots) > 1 else [])
    except (LookupError, TypeError, ValueError) as error:
        raise DDQError(
            f"{run.path / METRICS} is damaged; move it away for pictures without figures over time."
        ) from error


def _draw_bits_over_time(
    run: Run, metrics: Sequence[dict[str, Any]], names: Sequence[str]
) -> RunFigure:
    budget = run.recipe().budget
    target = budget.target_bits if budget.count == "bytes" else None  # the unit of the figure
    shown = _evenly(metrics)
    bits = np.array([[entry["bits"][name] for name in names] for entry in shown], float)
    figure = plots.bits_over_time_figure(
        [entry["step"] for entry in shown],
        names,
        bits,
        [entry["average_bits"] for entry in shown],
        target,
    )
    caption = (
        "Above: stored bits a weight, with levels, scales and gates. Below: bits of each layer's "
        "weights; at the right, the last ones."
    )
    return RunFigure("bits-over-time", figure, caption)


def _draw_probabilities(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> list[RunFigure]:
    """Draw the DBPs of a run of SDQ, up to the freeze; other runs have none."""
    sampled = [entry for entry in metrics if entry.get("probabilities")]
    if not sampled:
        return []
    shown = _evenly(sampled)
    names = [name for name in names if any(name in e["probabilities"] for e in shown)]
    figure = plots.probabilities_over_time_figure(
        [entry["step"] for entry in shown],
        names,
        [[entry["probabilities"].get(name, np.nan) for name in names] for entry in shown],
        [[entry["bits"][name] for name in names] for entry in shown],
    )
    caption = (
        "Probability with which each layer had the larger of two neighboring bit-widths. Numbers: "
        "the more probable one, where it changes. A step from dark to bright is a commitment: the "
        "smaller bit-width became the larger one of the next pair."
    )
    return [RunFigure("dbps-over-time", figure, caption)]


def _draw_loss(
    metrics: Sequence[dict[str, Any]],
    looks: Sequence[dict[str, Any]],
    course: Course | None,
    metric: Metric,
) -> RunFigure:
    """Draw loss and metric over time, on training batches and on held-out training samples."""
    steps, loss, accuracy = (
        _thinned([entry[key] for entry in metrics]) for key in ("step", "loss", "train_accuracy")
    )
    held_out = [(e["step"], e["held_out_loss"], e["held_out_accuracy"]) for e in looks]
    frozen = metrics[-1].get("batch_norm_step")
    figure = plots.loss_over_time_figure(
        steps, loss, accuracy, held_out, course.best_step if course else None, metric.label, frozen
    )
    caption = "Held-out samples are training samples that no step has used." if looks else ""
    if frozen is not None:
        caption += (
            f" At step {frozen:,}, BatchNorm's statistics are estimated anew and frozen, which "
            "moves the loss."
        )
    return RunFigure("loss", figure, caption.strip())


def _draw_snapshots(
    run: Run, snapshots: Sequence[dict[str, Any]], rows: Sequence[TensorRow]
) -> list[RunFigure]:
    """Draw quantization error and levels over time."""
    steps = [entry["step"] for entry in snapshots]
    errors = {row.name: [entry["error"][row.name] for entry in snapshots] for row in rows}
    caption = (
        "Sum of squared differences between quantized weights q and float weights w, over the sum "
        "of squares. The layers with the largest error at the end have names. All fall to almost 0 "
        "where a run moves its weights onto their levels. The last point is the delivered state."
    )
    figure = plots.error_over_time_figure(steps, errors)
    levels = _level_figures(run, snapshots, rows)
    return [RunFigure("error-over-time", figure, caption), *levels]


def _level_figures(
    run: Run, snapshots: Sequence[dict[str, Any]], rows: Sequence[TensorRow]
) -> list[RunFigure]:
    """Draw how the levels of the layers with the largest error moved."""
    with_levels = [row for row in rows if row.name in snapshots[-1]["levels"]]
    by_error = sorted(with_levels, key=lambda row: -row.error)
    names = [row.name for row in by_error[:LAYERS_WITH_LEVELS]]
    figures = {}
    for quantized, weights in run_tensors(run):
        name = quantized.name
        if name in names:
            histogram = histogram_of(weights, run.path)
            counts = np.array(shown_counts(histogram)).reshape(-1, 2).sum(1)
            edges = np.linspace(histogram.low, histogram.high, SHOWN_BINS // 2 + 1)
            entries = [entry for entry in snapshots if name in entry["levels"]]
            steps = [entry["step"] for entry in entries]
            levels = [entry["levels"][name] for entry in entries]
            figures[name] = plots.levels_over_time_figure(name, steps, levels, edges, counts)
    caption = "Layer {} of the {} with the largest error; at the right, its float weights."
    return [
        RunFigure(f"levels-over-time-{k + 1}", figures[name], caption.format(k + 1, len(names)))
        for k, name in enumerate(names)
    ]


def _evenly(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most MAX_POINTS of the entries, evenly spread."""
    places = np.unique(np.linspace(0, len(entries) - 1, MAX_POINTS).round().astype(int))
    return [entries[k] for k in places]


def _thinned(values: Sequence[float]) -> list[float]:
    """Return means of equally many neighbors, at most MAX_POINTS; the last may be of fewer."""
    width = -(-len(values) // MAX_POINTS)
    return [float(np.mean(values[k : k + width])) for k in range(0, len(values), width)]
