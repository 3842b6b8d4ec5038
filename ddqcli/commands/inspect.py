"""`ddq inspect`: what each layer's weights look like, and what quantizing them would cost, before any training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddqcli.artifact.tensors import tensor_bytes
from ddqcli.errors import CheckpointError
from ddqcli.quant.fit import (
    Array,
    Distribution,
    lloyd_max,
    power_of_two_pattern,
    scaled,
    squared_error,
    uniform_pattern,
)
from ddqcli.quant.shape import shape_of
from ddqcli.stored import StoredTensor, is_artifact, stored_tensors

if TYPE_CHECKING:
    from ddqcli.commands.inspect_trained import TrainedResult

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
    channels: tuple[tuple[float, ...], ...] = ()  # depthwise: min, q25, median, q75, max of each output channel


@dataclass(frozen=True)
class InspectResult:
    """All layers of a checkpoint, and what they weigh together."""

    path: Path
    note: str  # how the tensors were found
    layers: tuple[LayerRow, ...]
    rest: dict[str, int]  # what stays as it is (biases, norms, counters): tensors, parameters, bytes
    tied: dict[str, str]  # tensors that share the memory of an earlier one, which they are counted with
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
        layers = [{key: value for key, value in asdict(row).items() if key != "channels"} for row in self.layers]
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


def inspect(
    path: Path, *, out: Path | None = None, pickle: bool = False, on_progress: Progress | None = None
) -> InspectResult | TrainedResult:
    """Look at every weight tensor in the checkpoint, run folder or exported file `path`; write pictures and a page into `out`.

    `on_progress(done, total, name)` is called before each tensor and once at the end. Raises DDQError and its children.
    """
    if path.is_dir() or is_artifact(path):
        from ddqcli.commands.inspect_trained import inspect_trained

        return inspect_trained(path, out=out, on_progress=on_progress)
    return inspect_checkpoint(path, out=out, pickle=pickle, on_progress=on_progress)


def inspect_checkpoint(path: Path, *, out: Path | None, pickle: bool, on_progress: Progress | None) -> InspectResult:
    """`inspect` of a checkpoint. Raises CheckpointError."""
    tensors, note = stored_tensors(path, pickle=pickle)
    if not any(tensor.parameters for tensor in tensors):
        raise CheckpointError(f"{path} holds no tensors; save the model's state_dict() in it.")
    weights = [tensor for tensor in tensors if _is_weight(tensor)]
    others = [tensor for tensor in tensors if not _is_weight(tensor) and not tensor.same_as]
    for tensor in others:
        if tensor.floating:
            _range(tensor, path)
    rest = {
        "tensors": len(others),
        "parameters": sum(tensor.parameters for tensor in others),
        "bytes": sum(tensor.bytes for tensor in others),
    }
    layers = tuple(layer_rows(weights, path, on_progress))
    result = InspectResult(
        path,
        note,
        layers,
        rest,
        {tensor.name: tensor.same_as for tensor in tensors if tensor.same_as},
        {bits: sum(tensor_bytes([row.parameters], [bits]) for row in layers) + rest["bytes"] for bits in TOTAL_BITS},
    )
    if out is None:
        return result
    from ddqcli.commands.inspect_pictures import write_pictures

    return write_pictures(result, out, on_progress)


def layer_rows(weights: Iterable[StoredTensor], path: Path, on_progress: Progress | None = None) -> Iterator[LayerRow]:
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


def _is_weight(tensor: StoredTensor) -> bool:
    return tensor.floating and len(tensor.shape) >= 2 and tensor.parameters > 0 and not tensor.same_as


def _row(tensor: StoredTensor, kind: str, path: Path) -> LayerRow:
    distribution = summarise(tensor, path)
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


def summarise(tensor: StoredTensor, path: Path) -> Distribution:
    """A tensor's distribution in two passes over its pieces, the first for its range. Raises CheckpointError."""
    low, high = _range(tensor, path)
    parts = (Distribution.of(piece, BINS, low, high) for piece in tensor.pieces())
    whole = next(parts)
    for part in parts:
        whole = whole + part
    return whole


def _range(tensor: StoredTensor, path: Path) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for piece in tensor.pieces():
        bounds = float(piece.min()), float(piece.max())
        if not np.isfinite(bounds).all():  # NaN anywhere makes both bounds NaN
            raise CheckpointError(
                f"{path}: {tensor.name} holds NaN or infinite values; the training that saved it had diverged: take an "
                "earlier checkpoint."
            )
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return low, high


def shown_histogram(distribution: Distribution) -> tuple[int, ...]:
    """Values in each of SHOWN_BINS bins."""
    return tuple(int(n) for n in distribution.count.reshape(SHOWN_BINS, -1).sum(1))


def fixed_errors(distribution: Distribution, bits: int) -> tuple[dict[str, float], Array]:
    """Relative errors by kind of levels, each fitted to the distribution; and the best levels."""
    fitted = {
        "uniform": scaled(distribution, uniform_pattern(bits)),
        "power_of_two": scaled(distribution, power_of_two_pattern(bits)),
        "best": lloyd_max(distribution, 2**bits),
    }
    total = distribution.square or 1.0  # all zeros have no error
    errors = {kind: squared_error(distribution, levels) / total for kind, levels in fitted.items()}
    return errors, fitted["best"]


def _channels(tensor: StoredTensor) -> tuple[tuple[float, ...], ...]:
    """Five-number summaries [C, 5]; depthwise tensors are small."""
    values = np.concatenate(list(tensor.pieces())).reshape(tensor.shape[0], -1)
    return tuple(map(tuple, np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=1).T.tolist()))
