"""A layer as what it is to its inputs: a matrix W, with y = W x for each patch x that the layer reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a tensor shaped as the layer's weight as [G, O, I].

    For each of G groups, it maps the I values of one input patch to O outputs.
    """
    if isinstance(
        layer, TRANSPOSED
    ):  # [C, O, *K], and the equal convolution reads its kernel backwards
        grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return grouped.flip(*range(3, grouped.ndim)).flatten(2)
    groups: Any = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrix`, for a weight of this shape."""
    if isinstance(layer, TRANSPOSED):
        grouped = matrix.unflatten(2, (shape[0] // layer.groups, *shape[2:]))
        return grouped.flip(*range(3, grouped.ndim)).transpose(1, 2).reshape(shape)
    return matrix.reshape(shape)


def patches(layer: nn.Module, x: Tensor, most: int) -> Tensor:
    """About `most` of the patches that the layer reads in its input x, drawn at random: [G, I, P].

    Inputs of one shape are read at the same places, so that a float and a quantized network's patches are pairs.
    """
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_drawn(len(rows), most).to(x.device)].T[None]
    batch = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
    if layer.padding_mode != "zeros":
        batch = F.pad(batch, layer._reversed_padding_repeated_twice, layer.padding_mode)
    index, inside = (t.to(x.device) for t in _taps(layer, batch.shape, most))
    read = batch.flatten(2).flatten(0, 1).index_select(1, index.flatten()) * inside.flatten()
    by_place = read.view(len(batch), layer.groups, -1, *index.shape)  # [N, G, C / G, places, taps]
    return by_place.permute(1, 2, 4, 0, 3).reshape(layer.groups, -1, len(batch) * len(index))


def channels(x: Tensor, most: int) -> Tensor:
    """About `most` of the values of each channel of x [N, C, *L], drawn at random: [C, P]."""
    flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    drawn = _drawn(flat.shape[2], -(-most // len(x))).to(x.device)
    read = flat.flatten(0, 1).index_select(1, drawn)  # of a matrix, much faster than of [N, C, L]
    return read.view(*flat.shape[:2], -1).transpose(0, 1).flatten(1)


def _drawn(count: int, most: int) -> Tensor:
    """`most` of `count` indices at random, or all."""
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=torch.Generator().manual_seed(0))


def _taps(layer: nn.modules.conv._ConvNd, shape: torch.Size, most: int) -> tuple[Tensor, Tensor]:
    """Where a kernel's taps lie in an input of this shape [N, C, *L] at places drawn at random.

    Returns:
        Indices into the flattened L [places, taps], and whether the tap reads the input there or padding.
    """
    transposed = isinstance(
        layer, TRANSPOSED
    )  # a convolution of the input with stride - 1 zeros between its values
    padding = layer._reversed_padding_repeated_twice[
        ::-1
    ]  # after and before, first dimension first
    dims = []
    for n, (size, kernel, stride, dilation) in enumerate(
        zip(shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        reach = dilation * (kernel - 1)
        if transposed:
            before = reach - int(layer.padding[n])
            places = (size - 1) * stride + 2 * before - reach + 1
            dims.append((size, before, places, 1, stride, kernel, dilation))
        else:
            after, before = padding[2 * n : 2 * n + 2] if layer.padding_mode == "zeros" else (0, 0)
            places = (size + before + after - reach - 1) // stride + 1
            dims.append((size, before, places, stride, 1, kernel, dilation))
    counts = [places for _, _, places, *_ in dims]
    drawn = torch.unravel_index(_drawn(math.prod(counts), -(-most // shape[0])), counts)
    index = torch.zeros(len(drawn[0]), 1, dtype=torch.int64)
    inside = torch.ones_like(index, dtype=torch.bool)
    for place, (size, before, _, step, spacing, kernel, dilation) in zip(drawn, dims, strict=True):
        at = step * place[:, None] - before + dilation * torch.arange(kernel)
        reads = (at >= 0) & (at < (size - 1) * spacing + 1) & (at % spacing == 0)
        at = torch.where(reads, at // spacing, 0)
        index = (index[:, :, None] * size + at[:, None]).flatten(1)
        inside = (inside[:, :, None] & reads[:, None]).flatten(1)
    return index, inside
