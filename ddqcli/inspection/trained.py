"""`ddq inspect` of a run or an exported file: the levels that were learned, over the weights they stand for; without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddqcli.artifact.format import QuantizedTensor, read_artifact
from ddqcli.checkpoint.tensors import CheckpointTensor, tensors_at
from ddqcli.checkpoint.torch_zip import load_structure, read_tensor
from ddqcli.errors import DDQError
from ddqcli.inspection.distribution import shape_of
from ddqcli.inspection.report import read_report
from ddqcli.inspection.weights import (
    SHOWN_BINS,
    VERSION,
    Progress,
    fixed_errors,
    shown_histogram,
    summarize,
)
from ddqcli.runs.run import FINAL, Run

ERROR = "Error: sum of squared differences to the float weights over the sum of squares, in %."
FIXED = (
    "Trained levels serve the loss; uniform, power-of-two and best (Lloyd-Max) ones, fitted to the same weights at the same "
    "bits, may come closer."
)


@dataclass(frozen=True)
class TrainedRow:
    """One quantized weight tensor. Every error is ||q - w||² / ||w||² over the float weights w that it stands for."""

    name: str
    kind: str  # conv, depthwise, linear, embedding
    shape: tuple[int, ...]
    parameters: int
    bytes: int  # in the file
    bits: float  # their mean where each channel has its own
    error: dict[
        str, float | None
    ]  # trained; uniform, power_of_two, best: fitted to w at the same bits
    levels: tuple[float, ...]  # in force, ascending, each once; none where each channel has its own
    counts: tuple[int, ...]  # values stored at each of the levels
    min: float
    max: float
    histogram: tuple[int, ...]  # values in each of SHOWN_BINS equal bins from min to max
    distribution: str | None  # the float weights' shape in a word
    tail_weight: float | None


@dataclass(frozen=True)
class TrainedResult:
    """What a finished run, or an exported file, made of the weights."""

    what: str  # run or artifact
    path: Path
    note: str
    histogram_of: str  # "float weights" or, as an exported file has none, "stored values"
    layers: tuple[TrainedRow, ...]
    report: dict[str, Any]  # as `ddq report` has it
    pictures: tuple[Path, ...] = ()

    def data(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return {
            "version": VERSION,
            "what": self.what,
            "path": str(self.path),
            "note": self.note,
            "histogram_of": self.histogram_of,
            "layers": [asdict(row) for row in self.layers],
            "totals": self.report["totals"],
            "accuracy": self.report["accuracy"],
            "pictures": [str(picture) for picture in self.pictures],
        }


def inspect_trained(
    path: Path, *, out: Path | None = None, on_progress: Progress | None = None
) -> TrainedResult:
    """Look at every quantized weight of a run folder or an exported file; write pictures and a page into `out`.

    Raises DDQError and its children.
    """
    found = read_report(path)[1]
    if path.is_dir():
        what, histogram_of, tensors = "run", "float weights", run_tensors(path)
    else:
        what, histogram_of, tensors = "artifact", "stored values", _stored(path)
    rows = {
        row["name"]: row
        for row in found["layers"]
        if row["kind"] != "bias" and 0 not in row["shape"]
    }
    layers = {}
    for quantized, weights in tensors:
        if quantized.name in rows:
            if on_progress:
                on_progress(len(layers), len(rows), quantized.name)
            layers[quantized.name] = _row(rows[quantized.name], quantized, weights, path)
    if on_progress:
        on_progress(len(rows), len(rows), "")
    steps = found["run"]["steps"]
    note = f"{'finetuned' if what == 'run' else 'exported'} from {found['source']['path']}, {steps:,} steps"
    in_order = tuple(layers[name] for name in rows)
    result = TrainedResult(what, path, note, histogram_of, in_order, found)
    if out is None:
        return result
    from ddqcli.inspection.trained_page import write_pictures

    return write_pictures(result, out, on_progress)


def run_tensors(path: Path) -> Iterator[tuple[QuantizedTensor, CheckpointTensor]]:
    """Each quantized tensor of a run with the float weights behind it. Raises UsageError, and DDQError for a damaged run."""
    run = Run.open(path)
    file = run.path / FINAL
    content = load_structure(file)
    try:
        weights = {tensor.name: tensor for tensor in tensors_at(file, content["weights"])}
        for entry in content["quantized"]:
            yield _quantized(file, entry), weights[entry["name"]]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        run.load(FINAL)  # says what is wrong with it
        raise DDQError(
            f"{file} is not as this version of ddq writes it; run `ddq finetune` again."
        ) from error


def _quantized(file: Path, entry: dict[str, Any]) -> QuantizedTensor:
    indices, scale, zero_point = (
        read_tensor(file, entry[key]) for key in ("indices", "scale", "zero_point")
    )
    levels = tuple(read_tensor(file, level) for level in entry["levels"])
    return QuantizedTensor(
        entry["name"],
        tuple(entry["shape"]),
        entry["axis"],
        indices.reshape(-1),
        levels,
        scale,
        zero_point,
    )


def _stored(path: Path) -> Iterator[tuple[QuantizedTensor, None]]:
    for tensor in read_artifact(path).quantized.values():
        yield tensor, None


def _row(
    row: dict[str, Any], quantized: QuantizedTensor, weights: CheckpointTensor | None, path: Path
) -> TrainedRow:
    values, counts = stored_values(quantized)
    one_set = len(quantized.levels) == 1
    error: dict[str, float | None] = {
        "trained": row["error"],
        "uniform": None,
        "power_of_two": None,
        "best": None,
    }
    if weights is None:
        low, high, shape = float(values[0]), float(values[-1]), None
        histogram = np.histogram(values, SHOWN_BINS, (low, high), weights=counts)[0]
    else:
        distribution = summarize(weights, path)
        low, high, shape = distribution.low, distribution.high, shape_of(distribution)
        histogram = shown_histogram(distribution)
        if one_set:
            error |= fixed_errors(distribution, quantized.bits[0])[0]
    return TrainedRow(
        name=row["name"],
        kind=short_kind(row["kind"]),
        shape=tuple(row["shape"]),
        parameters=math.prod(row["shape"]),
        bytes=row["bytes"],
        bits=row["bits"],
        error=error,
        levels=tuple(values.tolist()) if one_set else (),
        counts=tuple(counts.tolist()) if one_set else (),
        min=low,
        max=high,
        histogram=tuple(int(n) for n in histogram),
        distribution=shape.word if shape else None,
        tail_weight=shape.tail_weight if shape else None,
    )


def stored_values(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """The level values of all groups, ascending and each once, and how many values of the tensor each one has."""
    taken = [
        np.bincount(row, minlength=len(levels))
        for row, levels in zip(tensor.rows(), tensor.levels, strict=True)
    ]
    values = [
        (levels.astype(np.float32) - zero_point) * scale
        for levels, scale, zero_point in zip(
            tensor.levels, tensor.scale, tensor.zero_point, strict=True
        )
    ]
    found, place = np.unique(np.concatenate(values), return_inverse=True)
    return found, np.bincount(place, weights=np.concatenate(taken)).astype(np.int64)


def short_kind(kind: str) -> str:
    """A report's kind (Conv2d, depthwise Conv2d, Linear, ...) as `ddq inspect` names it: conv, depthwise, ..., or bias."""
    lower = kind.lower()
    return next(
        (word for word in ("bias", "depthwise", "conv", "embedding") if word in lower), "linear"
    )
