"""Rows of a run or an exported file: the levels learned, over the weights they stand for.

Reads without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddqcli.artifact.read import read_artifact
from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.checkpoint.tensors import CheckpointTensor, tensors_at
from ddqcli.checkpoint.torch_zip import load_structure, read_tensor
from ddqcli.errors import DDQError
from ddqcli.inspection.checkpoint_rows import VERSION, Progress
from ddqcli.inspection.distribution import shape_of
from ddqcli.inspection.histograms import (
    SHOWN_BINS,
    fit_levels,
    histogram_of,
    relative_errors,
    shown_counts,
)
from ddqcli.inspection.report import read_report
from ddqcli.qat.frozen import quantized_tensor
from ddqcli.runs.report import Report, TensorRow
from ddqcli.runs.run import FINAL, Run

# Notes below tables, in the terminal and on pages.
ERROR_NOTE = "Error: sum of squared differences to the float weights over the sum of squares, in %."
FITTED_NOTE = (
    "Trained levels minimize the loss; uniform, power-of-two and best (Lloyd-Max) levels, fitted "
    "to the same weights at the same bits, may come closer to them."
)


@dataclass(frozen=True)
class TrainedRow:
    """One quantized weight tensor. Errors are ||q - w||² / ||w||² over its float weights w."""

    name: str
    kind: str  # conv, depthwise, linear, embedding
    shape: tuple[int, ...]
    parameters: int
    bytes: int  # in the file
    bits: float  # the mean if each channel has its own
    error: dict[str, float | None]  # trained; uniform, power_of_two, best: fitted at the same bits
    levels: tuple[float, ...]  # in force, ascending, distinct; empty if each channel has its own
    counts: tuple[int, ...]  # values stored at each of the levels
    min: float
    max: float
    histogram: tuple[int, ...]  # values in each of SHOWN_BINS equal bins from min to max
    distribution: str | None  # of the float weights, in a word
    tail_weight: float | None


@dataclass(frozen=True)
class TrainedResult:
    """All quantized weights of a finished run or an exported file."""

    what: Literal["run", "artifact"]
    path: Path
    note: str
    histogram_of: str  # "float weights"; "stored values" of an exported file, which has no others
    layers: tuple[TrainedRow, ...]
    report: Report
    pictures: tuple[Path, ...] = ()

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        report = self.report.data()
        return {
            "version": VERSION,
            "what": self.what,
            "path": str(self.path),
            "note": self.note,
            "histogram_of": self.histogram_of,
            "layers": [asdict(row) for row in self.layers],
            "totals": report["totals"],
            "metric": report["metric"],
            "accuracy": report["accuracy"],
            "pictures": [str(picture) for picture in self.pictures],
        }


def describe_trained(path: Path, on_progress: Progress | None = None) -> TrainedResult:
    """Describe every quantized weight of a run folder or an exported file.

    Biases and empty tensors are left out. Raises UsageError if there is no such run, DDQError for
    a damaged run and VerificationError for a damaged file.
    """
    _, report = read_report(path)
    reported = {row.name: row for row in report.layers if row.kind != "bias" and 0 not in row.shape}
    rows: dict[str, TrainedRow] = {}
    tensors = run_tensors(Run.open(path)) if path.is_dir() else _artifact_tensors(path)
    for quantized, weights in tensors:
        if quantized.name in reported:
            if on_progress:
                on_progress(len(rows), len(reported), quantized.name)
            rows[quantized.name] = _row(reported[quantized.name], quantized, weights, path)
    if on_progress:
        on_progress(len(reported), len(reported), "")
    origin = f"from {report.source.path}, {report.run.steps:,} steps"
    in_order = tuple(rows[name] for name in reported)
    if path.is_dir():
        return TrainedResult("run", path, f"finetuned {origin}", "float weights", in_order, report)
    return TrainedResult("artifact", path, f"exported {origin}", "stored values", in_order, report)


def run_tensors(run: Run) -> Iterator[tuple[QuantizedTensor, CheckpointTensor]]:
    """Yield each quantized tensor of a run with the float weights behind it.

    Raises UsageError if final.pt is missing, DDQError if it is damaged.
    """
    file = run.path / FINAL
    state = load_structure(file)
    try:
        weights = {tensor.name: tensor for tensor in tensors_at(file, state["weights"])}
        for entry in state["quantized"]:
            quantized = quantized_tensor(entry, lambda location: read_tensor(file, location))
            yield quantized, weights[quantized.name]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        run.load(FINAL)  # raises an error that names the fault
        raise DDQError(
            f"{file} is not as this version of ddq writes it; run `ddq finetune` again."
        ) from error


def short_kind(kind: str) -> str:
    """Map a report's kind (Conv2d, depthwise Conv2d, ...) to conv, depthwise, ..., or bias."""
    lower = kind.lower()
    return next(
        (word for word in ("bias", "depthwise", "conv", "embedding") if word in lower), "linear"
    )


def level_counts(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct level values of all groups, ascending, and the elements at each."""
    counts = [
        np.bincount(row, minlength=len(levels))
        for row, levels in zip(tensor.rows(), tensor.levels, strict=True)
    ]
    values = [
        (levels.astype(np.float32) - zero_point) * scale
        for levels, scale, zero_point in zip(
            tensor.levels, tensor.scale, tensor.zero_point, strict=True
        )
    ]
    distinct, places = np.unique(np.concatenate(values), return_inverse=True)
    return distinct, np.bincount(places, weights=np.concatenate(counts)).astype(np.int64)


def _artifact_tensors(path: Path) -> Iterator[tuple[QuantizedTensor, None]]:
    for tensor in read_artifact(path).quantized.values():
        yield tensor, None


def _row(
    reported: TensorRow, quantized: QuantizedTensor, weights: CheckpointTensor | None, path: Path
) -> TrainedRow:
    values, counts = level_counts(quantized)
    one_group = len(quantized.levels) == 1
    error: dict[str, float | None] = {
        "trained": reported.error,
        **dict.fromkeys(("uniform", "power_of_two", "best")),
    }
    if weights is None:
        low, high, shape = float(values[0]), float(values[-1]), None
        shown = np.histogram(values, SHOWN_BINS, (low, high), weights=counts)[0]
    else:
        histogram = histogram_of(weights, path)
        low, high, shape = histogram.low, histogram.high, shape_of(histogram)
        shown = np.array(shown_counts(histogram))
        if one_group:
            error |= relative_errors(histogram, fit_levels(histogram, quantized.bits[0]))
    return TrainedRow(
        name=reported.name,
        kind=short_kind(reported.kind),
        shape=reported.shape,
        parameters=math.prod(reported.shape),
        bytes=reported.bytes,
        bits=reported.bits,
        error=error,
        levels=tuple(values.tolist()) if one_group else (),
        counts=tuple(counts.tolist()) if one_group else (),
        min=low,
        max=high,
        histogram=tuple(int(n) for n in shown),
        distribution=shape.word if shape else None,
        tail_weight=shape.tail_weight if shape else None,
    )
