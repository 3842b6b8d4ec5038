"""Tensors as rows, one row per group, without copies where the memory layout allows it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddqcli.quant.device_constants import device_constant


class Rows:
    """Two views of tensors: their own shapes, and rows for the kernels.

    One tensor with G groups along `axis` becomes [G, M]. G tensors of one group each become one row
    [1, N], with each group's parameters repeated for its values. Values are in memory order.
    """

    def __init__(self, tensors: Sequence[Tensor], axis: int, groups: int) -> None:
        self.tensors, self.axis, self.groups = tensors, axis, groups
        self.sizes = [x.numel() for x in tensors]

    def join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Rows of tensors with the shapes of the given ones; None stands for zeros."""
        alike = [
            match_layout(torch.zeros_like(like) if x is None else x, like)
            for x, like in zip(tensors, self.tensors, strict=True)
        ]
        if len(alike) == 1:
            return to_rows(alike[0], self.axis, self.groups)
        return torch.cat([to_rows(x, 0, 1) for x in alike], 1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`."""
        if len(self.tensors) == 1:
            return (from_rows(rows, self.tensors[0], self.axis),)
        parts: tuple[Tensor, ...] = rows.split(self.sizes, 1)  # type: ignore[no-untyped-call]
        pairs = zip(parts, self.tensors, strict=True)
        return tuple(from_rows(part.clone(), like, 0) for part, like in pairs)

    @property
    def starts(self) -> Tensor:
        """Start of each group in the joined rows, and the end of the last: int64 [G + 1]."""
        sizes = self.group_sizes
        ends = tuple(itertools.accumulate(sizes, initial=0))
        return device_constant(ends, self.tensors[0].device, torch.int64)

    @property
    def group_sizes(self) -> list[int]:
        """Number of values of each group."""
        if len(self.tensors) > 1:
            return self.sizes
        return [self.sizes[0] // self.groups] * self.groups

    def spread(self, *per_group: Tensor) -> list[Tensor]:
        """Parameters [G, 1] in the shape that broadcasts against the rows: [G, 1] or [1, N]."""
        if len(self.tensors) == 1:
            return list(per_group)
        device, total = self.tensors[0].device, sum(self.sizes)
        repeats = device_constant(tuple(self.sizes), device, torch.int64)
        return [t.view(-1).repeat_interleave(repeats, output_size=total)[None] for t in per_group]


def by_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], the groups along `axis`."""
    return x.reshape(1, -1) if groups == 1 else x.movedim(axis, 0).reshape(groups, -1)


def to_rows(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as contiguous [groups, -1]. Without a copy, in memory order, if each group is one block."""
    if _is_dense(x, axis, groups):
        return x.as_strided((groups, x.numel() // groups), (x.numel() // groups, 1))
    return by_group(x, axis, groups).contiguous()


def from_rows(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `to_rows(like, ...)`, for any values in `rows`."""
    if _is_dense(like, axis, len(rows)):
        return rows.as_strided(like.shape, like.stride())
    if len(rows) == 1:
        return rows.view(like.shape)
    return rows.view(like.movedim(axis, 0).shape).movedim(0, axis)


def match_layout(x: Tensor, like: Tensor) -> Tensor:
    """x in a memory layout for which `to_rows` gives the same order as for `like`."""
    if x.stride() == like.stride():
        return x
    if _is_dense(like, 0, 1):
        return torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.contiguous()


def broadcast_groups(per_group: Tensor, like: Tensor, axis: int) -> Tensor:
    """[G] in the shape that broadcasts against `like` along `axis`."""
    if len(per_group) == 1:
        return per_group.view(())
    shape = [1] * like.ndim
    shape[axis] = -1
    return per_group.view(shape)


def _is_dense(x: Tensor, axis: int, groups: int) -> bool:
    """True if x lies in memory without gaps, each group in one block."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous() or (
        x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])
    )
    return dense and x.numel() > 0 and (groups == 1 or axis == 0)
