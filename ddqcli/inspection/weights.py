"""Rows of a checkpoint: each weight's distribution, and what fewer bits would cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddqcli.checkpoint.tensors import CheckpointTensor
from ddqcli.errors import CheckpointError
from ddqcli.inspection.distribution import shape_of
from ddqcli.quant.histogram import Array, Histogram, squared_error
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern, power_of_two_pattern, uniform_pattern

VERSION = 1  # of the keys of `data()`
ERROR_BITS = (2, 3, 4, 8)
TOTAL_BITS = (8, 6, 4, 3, 2)
LEVEL_BITS = 4  # bits whose best levels are kept, to be drawn over the histogram
BINS = 1 << 14  # fine enough that 256 levels fitted to them err by 1 % where exact ones do
SHOWN_BINS = 128

_EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe)([._]|$)|token|position", re.IGNORECASE)
_DEPTHWISE = re.compile(r"depthwise|dwconv|(^|[._])dw", re.IGNORECASE)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerRow:
    """One weight tensor. The key of `error` is the bit-width; its values are ||q - x||² / ||x||² by kind of levels."""

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
    error: dict[int, dict[str, float]]  # uniform, power_of_two, best
    histogram: tuple[int, ...]  # values in each of SHOWN_BINS equal bins from min to max
    levels: tuple[float, ...]  # the best ones at LEVEL_BITS
    channels: tuple[
        tuple[float, ...], ...
    ] = ()  # depthwise: min, q25, median, q75, max of each output channel


@dataclass(frozen=True)
class InspectResult:
    """All layers of a checkpoint, and what they weigh together."""

    path: Path
    note: str  # how the tensors were found
    layers: tuple[LayerRow, ...]
    rest: dict[
        str, int
    ]  # what stays as it is (biases, norms, counters): tensors, parameters, bytes
    tied: dict[
        str, str
    ]  # tensors that share the memory of an earlier one, which they are counted with
    bytes_at: dict[int, int]  # all tensors, with every layer at so many bits
    pictures: tuple[Path, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.layers) + self.rest["parameters"]

    @property
    def bytes(self) -> int:
        """As stored."""
        return sum(row.bytes for row in self.layers) + self.rest["bytes"]

    def data(self) -> dict[str, Any]:
        """The result as JSON-able values. Channel ranges are left out; they are in the pictures."""
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


def layer_rows(
    weights: Iterable[CheckpointTensor], path: Path, on_progress: Progress | None = None
) -> Iterator[LayerRow]:
    """One row a tensor, each read, described and let go before the next."""
    weights = list(weights)
    several = sum(_has_one_input_channel(tensor.shape) for tensor in weights) > 1
    for done, tensor in enumerate(weights):
        if on_progress:
            on_progress(done, len(weights), tensor.name)
        yield _row(tensor, kind_of(tensor.name, tensor.shape, several), path)
    if on_progress:
        on_progress(len(weights), len(weights), "")


def kind_of(name: str, shape: tuple[int, ...], several_depthwise: bool = True) -> str:
    """Guess a weight's kind. A single [C, 1, k, k] in a file is the first layer of a network for grey images."""
    if len(shape) > 3 or (len(shape) == 3 and not _EMBEDDING.search(name)):
        depthwise = _has_one_input_channel(shape) and (several_depthwise or _DEPTHWISE.search(name))
        return "depthwise" if depthwise else "conv"
    return "embedding" if _EMBEDDING.search(name) else "linear"


def _has_one_input_channel(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 3 and shape[0] > 1 and shape[1] == 1 and math.prod(shape[2:]) > 1


def is_weight(tensor: CheckpointTensor) -> bool:
    return (
        tensor.floating and len(tensor.shape) >= 2 and tensor.parameters > 0 and not tensor.same_as
    )


def _row(tensor: CheckpointTensor, kind: str, path: Path) -> LayerRow:
    distribution = summarize(tensor, path)
    shape = shape_of(distribution)
    fitted = {bits: fixed_errors(distribution, bits) for bits in ERROR_BITS}
    return LayerRow(
        name=tensor.name,
        kind=kind,
        shape=tensor.shape,
        dtype=tensor.dtype,
        parameters=tensor.parameters,
        bytes=tensor.bytes,
        min=distribution.low,
        max=distribution.high,
        mean=shape.mean,
        std=shape.std,
        tail_weight=shape.tail_weight,
        distribution=shape.word,
        error={bits: errors for bits, (errors, _) in fitted.items()},
        histogram=shown_histogram(distribution),
        levels=tuple(float(level) for level in fitted[LEVEL_BITS][1]),
        channels=_channels(tensor) if kind == "depthwise" else (),
    )


def summarize(tensor: CheckpointTensor, path: Path) -> Histogram:
    """A tensor's distribution in two passes over its pieces, the first for its range. Raises CheckpointError."""
    low, high = value_range(tensor, path)
    parts = (Histogram.of(piece, BINS, low, high) for piece in tensor.chunks())
    whole = next(parts)
    for part in parts:
        whole = whole + part
    return whole


def value_range(tensor: CheckpointTensor, path: Path) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for piece in tensor.chunks():
        bounds = float(piece.min()), float(piece.max())
        if not np.isfinite(bounds).all():  # NaN anywhere makes both bounds NaN
            raise CheckpointError(
                f"{path}: {tensor.name} holds NaN or infinite values; the training that saved it had diverged: take an "
                "earlier checkpoint."
            )
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return low, high


def shown_histogram(distribution: Histogram) -> tuple[int, ...]:
    """Values in each of SHOWN_BINS bins."""
    return tuple(int(n) for n in distribution.count.reshape(SHOWN_BINS, -1).sum(1))


def fixed_errors(distribution: Histogram, bits: int) -> tuple[dict[str, float], Array]:
    """Relative errors by kind of levels, each fitted to the distribution; and the best levels."""
    fitted = {
        "uniform": fit_pattern(distribution, uniform_pattern(bits)),
        "power_of_two": fit_pattern(distribution, power_of_two_pattern(bits)),
        "best": lloyd_max(distribution, 2**bits),
    }
    total = distribution.square or 1.0  # all zeros have no error
    errors = {kind: squared_error(distribution, levels) / total for kind, levels in fitted.items()}
    return errors, fitted["best"]


def _channels(tensor: CheckpointTensor) -> tuple[tuple[float, ...], ...]:
    """Five-number summaries [C, 5]; depthwise tensors are small."""
    values = np.concatenate(list(tensor.chunks())).reshape(tensor.shape[0], -1)
    return tuple(map(tuple, np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=1).T.tolist()))
