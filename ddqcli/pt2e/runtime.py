"""The common face of both runtimes: convert a graph, read its weights back, run the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddqcli.errors import UsageError
from ddqcli.onnx.runtime import Answers
from ddqcli.pt2e.graph import Int8Model
from ddqcli.pt2e.integers import Symmetric

Array = NDArray[Any]
Int8Format = Literal["tflite", "pte"]
OneAnswer = Callable[[Sequence[Array]], Sequence[Array]]  # outputs of the inputs of one sample


@dataclass(frozen=True)
class Int8Runtime:
    """Functions of a runtime that a command needs.

    Attributes:
        name: for messages.
        file_format: the word after --format, and the ending of files.
        takes: what a call of the file takes and gives, for messages.
        require: raises UsageError unless its extra is installed.
        convert: returns the bytes of the file. Raises UsageError for what it cannot hold.
        missing: returns the names of the weights that are not in the file's bytes as they should.
        open: returns the answers of a file. Raises VerificationError if it cannot be loaded.
    """

    name: str
    file_format: Int8Format
    takes: str
    require: Callable[[], None]
    convert: Callable[[Int8Model], bytes]
    missing: Callable[[bytes, Mapping[str, Symmetric]], list[str]]
    open: Callable[[Path], OneAnswer]


def conversion_error(converter: str, error: Exception) -> UsageError:
    """Return the error of a converter in one line."""
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return UsageError(f"{converter} cannot convert the model: {type(error).__name__}: {reason}")


def sample_by_sample(answer: OneAnswer) -> Answers:
    """Return answers of whole batches, inputs in the order of the feed."""

    def answers(feed: Mapping[str, Array]) -> Sequence[Array]:
        arrays = list(feed.values())
        rows = [answer([x[k : k + 1] for x in arrays]) for k in range(len(arrays[0]))]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    return answers


def layouts(integers: Array) -> list[Array]:
    """Return weights [K, C, ...] in the orders in which runtimes store them."""
    last = np.moveaxis(integers, 1, -1)  # channels last
    return [np.ascontiguousarray(x) for x in (last, np.moveaxis(last, 0, -1), integers)]
