"""Weights as these runtimes hold them: int8 from -127 to 127 around 0, a scale for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.onnx.kernel import Kernel

Array = NDArray[Any]
LARGEST = 127
_MAX_SHIFT = 2.0**29  # of an int32, with room for the sum of products


@dataclass(frozen=True)
class Symmetric:
    """Weights integers * scale of K output channels, and the shift after them."""

    integers: Array  # int8 [K, C/groups, ...]
    scale: Array  # float32 [K], positive
    shift: Array  # float32 [K]
    exact: Array  # bool [K]: these channels hold the trained integers, or all of them negated

    @classmethod
    def of(cls, kernel: Kernel, input_scale: float) -> Symmetric:
        """Center the integers around 0; round those of a channel that then has any beyond 127.

        A channel is also rounded if its shift, in units of scale * input_scale, fits no int32: its
        weights hardly count.
        """
        channels = len(kernel.scale)
        rows = kernel.integers.reshape(channels, -1).astype(np.int32)
        rows = rows - kernel.zero_point.astype(np.int32)[:, None]
        rows *= np.where(kernel.scale < 0, -1, 1).astype(np.int32)[:, None]
        trained = np.abs(kernel.scale).astype(np.float64)
        largest = np.abs(rows).max(1, initial=0)
        needed = trained * np.maximum(1, largest / LARGEST)
        needed = np.maximum(needed, np.abs(kernel.shift) / (input_scale * _MAX_SHIFT))
        needed[needed == 0] = 1.0
        exact = needed == trained
        rounded = np.rint(rows * (trained / needed)[:, None])
        integers = np.where(exact[:, None], rows, rounded).astype(np.int8)
        scale = needed.astype(np.float32)
        return cls(integers.reshape(kernel.integers.shape), scale, kernel.shift, exact)
