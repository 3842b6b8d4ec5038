"""What a file holds of a quantized tensor and of a quantized activation, and the bytes this takes; numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def tensor_bytes(numel: Sequence[int], bits: Sequence[int]) -> int:
    """Bytes of a quantized tensor whose groups have so many elements of so many bits; of an activation: [0], [bits]."""
    indices = (sum(n * s for n, s in zip(numel, bits, strict=True)) + 7) // 8
    return (
        indices + sum(1 << s for s in bits if s < 8) + len(bits) * (4 + 1 + 1)
    )  # scale, zero point, gates


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor whose value is (levels[g][index] - zero_point[g]) * scale[g], exactly, in float32.

    Groups g lie along `axis`; there is one where `axis` is None. Raises ValueError where the fields do not fit.
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
            raise ValueError(
                f"{self.name} of shape {self.shape} has indices {self.indices.dtype}{self.indices.shape}"
            )
        groups = 1 if self.axis is None else self.shape[self.axis]
        _check_tables(self.name, groups, self.levels, self.scale, self.zero_point)
        for rows, levels in zip(self.rows(), self.levels, strict=True):
            if rows.size and int(rows.max()) >= len(levels):
                raise ValueError(
                    f"{self.name} has index {int(rows.max())} where there are {len(levels)} levels"
                )

    @property
    def bits(self) -> tuple[int, ...]:
        """[G] bits of an index."""
        return tuple(bits_of(levels) for levels in self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes([len(rows) for rows in self.rows()], self.bits)

    def rows(self) -> Bytes:
        """Indices [G, numel of a group]: of each group, in C order of its elements."""
        axis, groups = self.axis or 0, len(self.levels)
        moved = (
            np.moveaxis(self.indices.reshape(self.shape), axis, 0) if self.shape else self.indices
        )
        return moved.reshape(groups, self.indices.size // max(groups, 1))

    def integers(self) -> Bytes:
        """uint8 [shape]: the level of each element on the 8-bit grid."""
        rows = self.rows()
        chosen = np.empty_like(rows)
        for out, row, levels in zip(chosen, rows, self.levels, strict=True):
            out[...] = levels[row]
        return groups_to_axis(chosen, self.shape, self.axis)

    def dequantize(self) -> Floats:
        """float32 [shape]."""
        spread = [1] * len(self.shape)
        if self.axis is not None:
            spread[self.axis] = -1
        zero_point, scale = self.zero_point.reshape(spread), self.scale.reshape(spread)
        return np.asarray((self.integers().astype(np.float32) - zero_point) * scale, np.float32)


@dataclass(frozen=True, eq=False)
class ActivationTable:
    """The level vector of a layer's input; ValueError where the fields do not fit."""

    name: str
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
    def bits(self) -> int:
        return bits_of(self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes([0], [self.bits])

    @property
    def arrays(self) -> tuple[Floats, Bytes]:
        """Scale and zero point as arrays of one."""
        return np.array([self.scale], np.float32), np.array([self.zero_point], np.uint8)

    def values(self) -> Floats:
        """float32 [2^bits]."""
        scale, zero_point = self.arrays
        return np.asarray((self.levels.astype(np.float32) - zero_point) * scale, np.float32)


def groups_to_axis(rows: Bytes, shape: tuple[int, ...], axis: int | None) -> Bytes:
    """[G, numel of a group] as a tensor of `shape` with the groups along `axis`."""
    if not axis:
        return rows.reshape(shape)
    groups_first = shape[axis], *shape[:axis], *shape[axis + 1 :]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(groups_first), 0, axis))


def bits_of(levels: Bytes) -> int:
    return len(levels).bit_length() - 1


def _check_tables(
    name: str, groups: int, levels: Sequence[Bytes], scale: Floats, zero_point: Bytes
) -> None:
    if len(levels) != groups or scale.shape != (groups,) or zero_point.shape != (groups,):
        found = (
            f"{len(levels)} level vectors, {scale.size} scales and {zero_point.size} zero points"
        )
        raise ValueError(f"{name} has {groups} groups, and {found}")
    if (
        scale.dtype != np.float32
        or zero_point.dtype != np.uint8
        or any(level.dtype != np.uint8 for level in levels)
    ):
        raise ValueError(f"{name} needs uint8 levels and zero points and float32 scales")
    for level in levels:
        if level.ndim != 1 or len(level) not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(
                f"{name} has a level vector of shape {level.shape} where 2^bits levels are expected"
            )
        if np.any(level[1:] < level[:-1]) or (
            len(level) == 256 and np.any(level[1:] == level[:-1])
        ):
            raise ValueError(f"{name} has levels that do not ascend, or 256 that are not 0 to 255")
    if not np.all((scale >= 2.0**-126) & (scale < 2.0**120) & (scale.view(np.uint32) & 0xFFF == 0)):
        raise ValueError(
            f"{name} has a scale that is not a positive number of at most 12 significant bits: {scale}"
        )
