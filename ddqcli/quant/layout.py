"""Tensors as rows, one row a group, without copies where memory allows."""

from __future__ import annotations

import torch
from torch import Tensor


def by_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], the groups along `axis`."""
    return x.reshape(1, -1) if groups == 1 else x.movedim(axis, 0).reshape(groups, -1)


def to_rows(x: Tensor, axis: int, groups: int) -> Tensor:
    """x as [groups, -1], in the order of its memory where that is possible without a copy."""
    if _is_rows(x, axis, groups):
        return x.as_strided((groups, x.numel() // groups), (x.numel() // groups, 1))
    return by_group(x, axis, groups).contiguous()


def from_rows(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `to_rows`, for any values in `rows`."""
    if _is_rows(like, axis, len(rows)):
        return rows.as_strided(like.shape, like.stride())
    return (
        rows.view(like.shape)
        if len(rows) == 1
        else rows.view(like.movedim(axis, 0).shape).movedim(0, axis)
    )


def _is_rows(x: Tensor, axis: int, groups: int) -> bool:
    """Whether x lies in memory without gaps, each group in one piece."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous() or (
        x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])
    )
    return dense and x.numel() > 0 and (groups == 1 or axis == 0)


def match_layout(x: Tensor, pattern: Tensor) -> Tensor:
    """x as it has to lie in memory for `to_rows` to take it apart as it does `pattern`."""
    if x.stride() == pattern.stride():
        return x
    return (
        torch.empty_like(pattern, dtype=x.dtype).copy_(x)
        if _is_rows(pattern, 0, 1)
        else x.contiguous()
    )


def broadcast_groups(per_group: Tensor, like: Tensor, axis: int) -> Tensor:
    """[G] broadcast against `like` along `axis`."""
    if len(per_group) == 1:
        return per_group.view(())
    shape = [1] * like.ndim
    shape[axis] = -1
    return per_group.view(shape)
