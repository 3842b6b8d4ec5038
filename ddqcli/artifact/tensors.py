"""A quantized tensor and a quantized activation as a file holds them; numpy only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.sizes import tensor_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

INPUT_SUFFIX = " (input)"  # follows a layer's name in the name of its input's level table
# numpy has no bfloat16. Its bits under its name: tensor.view(torch.uint16).numpy().view(BFLOAT16)
BFLOAT16 = decoder.BFLOAT16


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor with the values (levels[g][index] - zero_point[g]) * scale[g], exact in float32.

    The G groups lie along `axis`; if that is None, there is one. Raises ValueError if the fields
    contradict each other.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None
    indices: Bytes  # [numel], C order
    levels: tuple[Bytes, ...]  # G ascending vectors of 2^bits entries; at 8 bits 0..255
    scale: Floats  # [G], normal positive numbers of at most 12 significant bits
    zero_point: Bytes  # [G]

    def __post_init__(self) -> None:
        if self.axis is not None and self.axis not in range(len(self.shape)):
            raise ValueError(f"{self.name} of shape {self.shape} has no axis {self.axis}")
        if self.indices.dtype != np.uint8 or self.indices.shape != (math.prod(self.shape),):
            indices = f"{self.indices.dtype}{self.indices.shape}"
            raise ValueError(f"{self.name} of shape {self.shape} has indices {indices}")
        groups = 1 if self.axis is None else self.shape[self.axis]
        _check_tables(self.name, groups, self.levels, self.scale, self.zero_point)
        for row, levels in zip(self.rows(), self.levels, strict=True):
            if row.size and int(row.max()) >= len(levels):
                raise ValueError(
                    f"{self.name} has index {int(row.max())} where there are {len(levels)} levels"
                )

    @property
    def bits(self) -> tuple[int, ...]:
        """[G] bit-widths of an index."""
        return tuple(_bits_of(levels) for levels in self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes([len(row) for row in self.rows()], self.bits)

    def rows(self) -> Bytes:
        """Return the indices [G, numel of a group], each group in C order of its elements."""
        axis, groups = self.axis or 0, len(self.levels)
        moved = (
            np.moveaxis(self.indices.reshape(self.shape), axis, 0) if self.shape else self.indices
        )
        return moved.reshape(groups, self.indices.size // max(groups, 1))

    def integers(self) -> Bytes:
        """Return the level of each element on the 8-bit grid, uint8 [shape]."""
        rows = self.rows()
        levels_of_rows = np.empty_like(rows)
        for out, row, levels in zip(levels_of_rows, rows, self.levels, strict=True):
            out[...] = levels[row]
        return _groups_to_axis(levels_of_rows, self.shape, self.axis)

    def dequantize(self) -> Floats:
        """Return the values, float32 [shape]."""
        along_axis = [1] * len(self.shape)
        if self.axis is not None:
            along_axis[self.axis] = -1
        zero_point, scale = self.zero_point.reshape(along_axis), self.scale.reshape(along_axis)
        return np.asarray((self.integers().astype(np.float32) - zero_point) * scale, np.float32)


@dataclass(frozen=True, eq=False)
class ActivationTable:
    """The level vector of a layer's input. Raises ValueError if the fields contradict."""

    name: str  # layer + INPUT_SUFFIX
    levels: Bytes  # [2^bits], ascending
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not 0 <= self.zero_point <= 255:
            raise ValueError(f"{self.name} has zero point {self.zero_point}, outside 0 to 255")
        if float(np.float32(self.scale)) != self.scale:
            raise ValueError(f"{self.name} has scale {self.scale}, which is no float32")
        _check_tables(self.name, 1, (self.levels,), *self.arrays)

    @property
    def layer(self) -> str:
        return self.name.removesuffix(INPUT_SUFFIX)

    @property
    def bits(self) -> int:
        return _bits_of(self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes([0], [self.bits])

    @property
    def arrays(self) -> tuple[Floats, Bytes]:
        """Scale and zero point as arrays of one element."""
        return np.array([self.scale], np.float32), np.array([self.zero_point], np.uint8)

    def values(self) -> Floats:
        """Return the level values, float32 [2^bits]."""
        scale, zero_point = self.arrays
        return np.asarray((self.levels.astype(np.float32) - zero_point) * scale, np.float32)


def check_aliases(aliases: Mapping[str, str], tensors: Collection[str]) -> None:
    """Raise ValueError if an alias points to none of `tensors`."""
    if missing := sorted({target for target in aliases.values() if target not in tensors}):
        raise ValueError(f"{', '.join(missing)}: an alias points here, and there is no such tensor")


def _groups_to_axis(rows: Bytes, shape: tuple[int, ...], axis: int | None) -> Bytes:
    """Reshape [G, numel of a group] to `shape`, with the groups along `axis`."""
    if not axis:
        return rows.reshape(shape)
    groups_first = shape[axis], *shape[:axis], *shape[axis + 1 :]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(groups_first), 0, axis))


def _bits_of(levels: Bytes) -> int:
    return len(levels).bit_length() - 1


def _check_tables(
    name: str, groups: int, levels: Sequence[Bytes], scale: Floats, zero_point: Bytes
) -> None:
    if len(levels) != groups or scale.shape != (groups,) or zero_point.shape != (groups,):
        counts = (
            f"{len(levels)} level vectors, {scale.size} scales and {zero_point.size} zero points"
        )
        raise ValueError(f"{name} has {groups} groups, and {counts}")
    uint8 = zero_point.dtype == np.uint8 and all(level.dtype == np.uint8 for level in levels)
    if scale.dtype != np.float32 or not uint8:
        raise ValueError(f"{name} needs uint8 levels and zero points and float32 scales")
    for level in levels:
        _check_levels(name, level)
    if not np.all((scale >= 2.0**-126) & (scale < 2.0**120) & (scale.view(np.uint32) & 0xFFF == 0)):
        raise ValueError(
            f"{name} has a scale that is not a positive number of at most 12 significant bits: "
            f"{scale}"
        )


def _check_levels(name: str, level: Bytes) -> None:
    if level.ndim != 1 or len(level) not in (2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(
            f"{name} has a level vector of shape {level.shape} where 2^bits levels are expected"
        )
    is_grid = len(level) < 256 or not np.any(level[1:] == level[:-1])
    if np.any(level[1:] < level[:-1]) or not is_grid:
        raise ValueError(f"{name} has levels that do not ascend, or 256 that are not 0 to 255")
