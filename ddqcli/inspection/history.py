"""What was learned in figures: bits by layer, and a run's course: bits, loss, error and levels over time; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.errors import DDQError
from ddqcli.inspection.trained import run_tensors, short_kind
from ddqcli.inspection.weights import SHOWN_BINS, shown_histogram, summarize
from ddqcli.runs.run import METRICS, Run

POINTS = 400  # along the step axis; a picture has no room for more
LAYERS_WITH_LEVELS = 6


@dataclass(frozen=True)
class FigureGroup:
    """What belongs under one heading: a text, and figures by the names of their files."""

    title: str
    text: str
    figures: dict[str, Figure]


def draw_bits(rows: Sequence[dict[str, Any]], order: str = "the network's") -> FigureGroup:
    """Bits by layer, of the report's `rows`."""
    names, kinds, bits = ([row[key] for row in rows] for key in ("name", "kind", "bits"))
    figure = plots.bits_by_layer_figure(names, [short_kind(kind) for kind in kinds], bits)
    return FigureGroup(
        "Bits by layer", f"In {order} order; biases are left out.", {"bits-by-layer": figure}
    )


def draw_course(run: Run, rows: Sequence[dict[str, Any]]) -> list[FigureGroup]:
    """What the metrics tell of the weights in `rows`, which are the report's; nothing of a run without steps.

    Raises DDQError for a damaged run.
    """
    names = [row["name"] for row in rows]
    try:
        reported, snapshots = run.metrics(), run.snapshots()
        budget = run.recipe().budget
        target = budget.target_bits if budget.count == "bytes" else None
        drawings = _of_steps(reported, names, target) if reported else []
        return drawings + (_of_snapshots(run, snapshots, rows) if snapshots else [])
    except (LookupError, TypeError, ValueError) as error:
        raise DDQError(
            f"{run.path / METRICS} is damaged; move it away for pictures without the course."
        ) from error


def _of_steps(
    reported: list[dict[str, Any]], names: list[str], target: float | None
) -> list[FigureGroup]:
    shown = [
        reported[k]
        for k in np.unique(np.linspace(0, len(reported) - 1, POINTS).round().astype(int))
    ]
    steps, average = [entry["step"] for entry in shown], [entry["average_bits"] for entry in shown]
    bits = np.array([[entry["bits"][name] for name in names] for entry in shown], float)
    text = "Above what is stored, levels, scales and gates included; below the bits of each weight's index."
    columns = (
        _thinned([entry[key] for entry in reported]) for key in ("step", "loss", "train_accuracy")
    )
    return [
        FigureGroup(
            "Bits over time",
            text,
            {"bits-over-time": plots.bits_over_time_figure(steps, names, bits, average, target)},
        ),
        FigureGroup("Loss", "", {"loss": plots.loss_over_time_figure(*columns)}),
    ]


def _of_snapshots(
    run: Run, snapshots: list[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[FigureGroup]:
    steps = [entry["step"] for entry in snapshots]
    errors = {row["name"]: [entry["error"][row["name"]] for entry in snapshots] for row in rows}
    text = "Sum of squared differences between quantized and float weights over the sum of squares."
    figure = plots.error_over_time_figure(steps, errors)
    drawings = [FigureGroup("Quantization error over time", text, {"error-over-time": figure})]
    if levels := _levels(run, snapshots, rows):
        text = "Layers of the largest error; beside the levels, the float weights at the end."
        drawings.append(FigureGroup("Levels over time", text, levels))
    return drawings


def _levels(
    run: Run, snapshots: list[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> dict[str, Figure]:
    """The movement of levels, of the layers with the largest error: there they have most to do."""
    drawn = [row for row in rows if row["name"] in snapshots[-1]["levels"]]
    chosen = [
        row["name"] for row in sorted(drawn, key=lambda row: -row["error"])[:LAYERS_WITH_LEVELS]
    ]
    figures = {}
    for tensor, stored in run_tensors(run.path):
        if tensor.name in chosen:
            distribution = summarize(stored, run.path)
            counts = np.array(shown_histogram(distribution)).reshape(-1, 2).sum(1)
            edges = np.linspace(distribution.low, distribution.high, SHOWN_BINS // 2 + 1)
            seen = [entry for entry in snapshots if tensor.name in entry["levels"]]
            steps, levels = (
                [entry["step"] for entry in seen],
                [entry["levels"][tensor.name] for entry in seen],
            )
            figures[tensor.name] = plots.levels_over_time_figure(
                tensor.name, steps, levels, edges, counts
            )
    return {f"levels-over-time-{k + 1}": figures[name] for k, name in enumerate(chosen)}


def _thinned(values: Sequence[float]) -> list[float]:
    """Means of as many neighbours each, so that at most POINTS are left; the last may be of fewer."""
    each = -(-len(values) // POINTS)
    return [float(np.mean(values[k : k + each])) for k in range(0, len(values), each)]
