"""Rows of a checkpoint: the distribution of each weight tensor, and the error at fewer bits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddqcli.artifact.sizes import tensor_bytes
from ddqcli.checkpoint.tensors import CheckpointTensor
from ddqcli.errors import CheckpointError
from ddqcli.inspection.distribution import shape_of
from ddqcli.inspection.histograms import (
    fit_levels,
    histogram_of,
    relative_errors,
    shown_counts,
    value_range,
)

VERSION = 1  # of the keys of `data()`
ERROR_BITS = (2, 3, 4, 8)
TOTAL_BITS = (8, 6, 4, 3, 2)
LEVEL_BITS = 4  # bit-width whose best levels are drawn over the histogram

_EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe)([._]|$)|token|position", re.IGNORECASE)
_DEPTHWISE = re.compile(r"depthwise|dwconv|(^|[._])dw", re.IGNORECASE)

Progress = Callable[[int, int, str], None]  # done, total, name of the tensor


@dataclass(frozen=True)
class CheckpointRow:
    """One weight tensor."""

    name: str
    kind: str  # conv, depthwise, linear or embedding, guessed from shape and name
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    min: float
    max: float
    mean: float
    std: float
    tail_weight: float
    distribution: str  # Gaussian-like, heavy-tailed, multi-peaked, flat, constant, too few
    error: dict[
        int, dict[str, float]
    ]  # bit-width -> uniform, power_of_two, best -> ||q-w||²/||w||²
    histogram: tuple[int, ...]  # values in each of SHOWN_BINS equal bins from min to max
    levels: tuple[float, ...]  # the best levels at LEVEL_BITS
    channels: tuple[tuple[float, ...], ...] = ()  # depthwise: [C, 5] min, q25, median, q75, max


@dataclass(frozen=True)
class CheckpointResult:
    """All weight tensors of a checkpoint, and the size of the whole."""

    path: Path
    note: str  # where in the file the tensors are
    layers: tuple[CheckpointRow, ...]
    rest: dict[str, int]  # biases, norms and counters: tensors, parameters, bytes
    tied: dict[str, str]  # tensor -> the earlier tensor whose memory it shares
    bytes_at: dict[int, int]  # size of all tensors with every layer at this bit-width
    pictures: tuple[Path, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.layers) + self.rest["parameters"]

    @property
    def bytes(self) -> int:
        """Bytes as stored."""
        return sum(row.bytes for row in self.layers) + self.rest["bytes"]

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values, without the channels' ranges."""
        layers = [
            {key: value for key, value in asdict(row).items() if key != "channels"}
            for row in self.layers
        ]
        for row in layers:
            row["error"] = {str(bits): errors for bits, errors in row["error"].items()}
        totals = {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bytes_at": {str(bits): size for bits, size in self.bytes_at.items()},
        }
        return {
            "version": VERSION,
            "what": "checkpoint",
            "path": str(self.path),
            "note": self.note,
            "layers": layers,
            "rest": self.rest,
            "tied": self.tied,
            "totals": totals,
            "pictures": [str(picture) for picture in self.pictures],
        }


def describe_checkpoint(
    tensors: Sequence[CheckpointTensor],
    path: Path,
    note: str,
    on_progress: Progress | None = None,
) -> CheckpointResult:
    """Describe every weight among the tensors of a checkpoint.

    Raises CheckpointError if there is no value at all, or one that is not finite.
    """
    if not any(tensor.parameters for tensor in tensors):
        raise CheckpointError(f"{path} holds no tensors; save the model's state_dict() in it.")
    weights = [tensor for tensor in tensors if _is_weight(tensor)]
    others = [tensor for tensor in tensors if not _is_weight(tensor) and not tensor.same_as]
    for tensor in others:
        if tensor.floating:
            value_range(tensor, path)
    rest = {
        "tensors": len(others),
        "parameters": sum(tensor.parameters for tensor in others),
        "bytes": sum(tensor.bytes for tensor in others),
    }
    rows = tuple(_rows(weights, path, on_progress))
    bytes_at = {
        bits: sum(tensor_bytes([row.parameters], [bits]) for row in rows) + rest["bytes"]
        for bits in TOTAL_BITS
    }
    tied = {tensor.name: tensor.same_as for tensor in tensors if tensor.same_as}
    return CheckpointResult(path, note, rows, rest, tied, bytes_at)


def kind_of(name: str, shape: tuple[int, ...], several_depthwise: bool = True) -> str:
    """Guess a weight's kind: conv, depthwise, embedding or linear.

    With `several_depthwise` false, an only [C, 1, k, k] is the first layer of a network for gray
    images, unless its name says depthwise.
    """
    if len(shape) > 3 or (len(shape) == 3 and not _EMBEDDING.search(name)):
        depthwise = _has_one_input_channel(shape) and (several_depthwise or _DEPTHWISE.search(name))
        return "depthwise" if depthwise else "conv"
    return "embedding" if _EMBEDDING.search(name) else "linear"


def _has_one_input_channel(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 3 and shape[0] > 1 and shape[1] == 1 and math.prod(shape[2:]) > 1


def _is_weight(tensor: CheckpointTensor) -> bool:
    return (
        tensor.floating and len(tensor.shape) >= 2 and tensor.parameters > 0 and not tensor.same_as
    )


def _rows(
    weights: Iterable[CheckpointTensor], path: Path, on_progress: Progress | None
) -> Iterator[CheckpointRow]:
    """Yield a row for each tensor; only one tensor is in memory at a time."""
    weights = list(weights)
    several = sum(_has_one_input_channel(tensor.shape) for tensor in weights) > 1
    for done, tensor in enumerate(weights):
        if on_progress:
            on_progress(done, len(weights), tensor.name)
        yield _row(tensor, kind_of(tensor.name, tensor.shape, several), path)
    if on_progress:
        on_progress(len(weights), len(weights), "")


def _row(tensor: CheckpointTensor, kind: str, path: Path) -> CheckpointRow:
    histogram = histogram_of(tensor, path)
    shape = shape_of(histogram)
    levels = {bits: fit_levels(histogram, bits) for bits in ERROR_BITS}
    return CheckpointRow(
        name=tensor.name,
        kind=kind,
        shape=tensor.shape,
        dtype=tensor.dtype,
        parameters=tensor.parameters,
        bytes=tensor.bytes,
        min=histogram.low,
        max=histogram.high,
        mean=shape.mean,
        std=shape.std,
        tail_weight=shape.tail_weight,
        distribution=shape.word,
        error={bits: relative_errors(histogram, fitted) for bits, fitted in levels.items()},
        histogram=shown_counts(histogram),
        levels=tuple(float(level) for level in levels[LEVEL_BITS]["best"]),
        channels=_channel_ranges(tensor) if kind == "depthwise" else (),
    )


def _channel_ranges(tensor: CheckpointTensor) -> tuple[tuple[float, ...], ...]:
    """Return five-number summaries [C, 5]. Depthwise tensors are small enough to be read whole."""
    values = np.concatenate(list(tensor.chunks())).reshape(tensor.shape[0], -1)
    return tuple(map(tuple, np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=1).T.tolist()))
