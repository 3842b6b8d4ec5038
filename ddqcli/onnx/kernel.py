"""Weights of a layer as int8 with one scale and shift an output channel; BatchNorm folded in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact.tensors import QuantizedTensor

Array = NDArray[Any]
MIN_CHANNELS = 16  # input channels from which on integer arithmetic of float results is faster
_MAX_SHIFT = 2**30  # fits an int32 with room for the sum of products


@dataclass(frozen=True)
class Kernel:
    """Weights (integers - zero_point) * scale of K output channels, and the shift after them."""

    integers: Array  # int8 [K, C/groups, ...]
    scale: Array  # float32 [K]; may be negative, or 0
    zero_point: Array  # int8 [K]
    shift: Array  # float32 [K]

    @classmethod
    def of(cls, tensor: QuantizedTensor, bias: Array | None) -> Kernel:
        channels = tensor.shape[0]
        integers, zero_point = to_int8(tensor)
        shift = np.zeros(channels, np.float32) if bias is None else np.broadcast_to(bias, channels)
        return cls(
            integers,
            np.broadcast_to(tensor.scale, channels),
            np.broadcast_to(zero_point, channels),
            shift,
        )

    @property
    def is_small(self) -> bool:
        """True if integers save no time: 3 input channels, or 1 of a depthwise convolution."""
        return bool(self.integers.shape[1] < MIN_CHANNELS)

    @property
    def has_one_zero_point(self) -> bool:
        return len(set(self.zero_point.tolist())) == 1

    def folded(
        self, weight: Array, bias: Array, mean: Array, variance: Array, epsilon: float
    ) -> Kernel:
        """Fold a BatchNorm that follows.

        Its factor goes into the scale, so the integers stay as they were trained.
        """
        factor = weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        shift = (self.shift - mean.astype(np.float64)) * factor + bias.astype(np.float64)
        scale = (self.scale * factor).astype(np.float32)
        return replace(self, scale=scale, shift=shift.astype(np.float32))

    def integer_shift(self, input_scale: Array) -> Array | None:
        """Return the shift in units of scale * input_scale, int32 [K]; None if it fits no int32."""
        unit = self.scale * input_scale
        with np.errstate(divide="ignore", invalid="ignore"):
            rounded = np.rint(self.shift.astype(np.float64) / unit)
        rounded[(unit == 0) & (self.shift == 0)] = 0
        if np.all(np.abs(rounded) < _MAX_SHIFT):
            return np.asarray(rounded, np.int32)
        return None


def to_int8(tensor: QuantizedTensor) -> tuple[Array, Array]:
    """Return int8 [shape] and zero points [G].

    The zero points are 0 if the values fit, since onnxruntime is fast at these.
    """
    along_axis = [1] * len(tensor.shape)
    if tensor.axis is not None:
        along_axis[tensor.axis] = -1
    levels, zero_point = tensor.integers().astype(np.int16), tensor.zero_point.astype(np.int16)
    centered = levels - zero_point.reshape(along_axis)
    if not levels.size or (centered.min() >= -128 and centered.max() <= 127):
        return centered.astype(np.int8), np.zeros(len(zero_point), np.int8)
    return (levels - 128).astype(np.int8), (zero_point - 128).astype(np.int8)
