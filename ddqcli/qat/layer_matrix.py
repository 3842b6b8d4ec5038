"""A layer as a matrix W: its outputs are y = W x for each patch x of its input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddqcli.qat.layer_config import CONVOLUTIONS, TRANSPOSED


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight`, shaped as the layer's own, as [G, O, I].

    For each of the layer's G groups, it maps the I values of a patch to O outputs.
    """
    groups = _groups(layer)
    if isinstance(layer, TRANSPOSED):  # [C, O, *K]: the convolution flips each kernel
        kernels = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
        return kernels.flip(_kernel_axes(kernels)).flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return a matrix [G, O, I] as a weight of `shape`: the inverse of `as_matrix`."""
    if isinstance(layer, TRANSPOSED):
        kernels = matrix.view(*matrix.shape[:2], -1, *shape[2:])
        return kernels.flip(_kernel_axes(kernels)).transpose(1, 2).reshape(shape)
    return matrix.reshape(shape)


def patches(layer: nn.Module, x: Tensor, most: int) -> Tensor:
    """Return about `most` of the patches that the layer reads in its input x, as [G, I, P].

    They are drawn at random, at the same places for inputs of the same shape. So the patches of a
    float and of a quantized network are pairs.
    """
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_draw(len(rows), most).to(x.device)].T[None]
    batch = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
    if layer.padding_mode != "zeros":
        batch = F.pad(batch, layer._reversed_padding_repeated_twice, layer.padding_mode)
    dimensions = _dimensions(layer, batch.shape[2:])
    index, inside = (t.to(x.device) for t in _taps(dimensions, -(-most // len(batch))))
    values = batch.flatten(2).flatten(0, 1).index_select(1, index.flatten()) * inside.flatten()
    by_place = values.view(len(batch), layer.groups, -1, *index.shape)  # [N, G, C / G, places, K]
    return by_place.permute(1, 2, 4, 0, 3).reshape(layer.groups, -1, len(batch) * len(index))


def channel_values(x: Tensor, most: int) -> Tensor:
    """Return about `most` values of each channel of x [N, C, *L], drawn like `patches`: [C, P]."""
    flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    places = _draw(flat.shape[2], -(-most // len(x))).to(x.device)
    values = flat.flatten(0, 1).index_select(1, places)  # much faster than from three dimensions
    return values.view(*flat.shape[:2], -1).transpose(0, 1).flatten(1)


def row_levels(layer: nn.Module, levels: Tensor, axis: int) -> Tensor:
    """Return the tables [T, n] of a weight for the rows of its matrix: [n] for one, or [G, O, n].

    With several tables, there is one per channel of the weight along `axis`.
    """
    if len(levels) == 1:
        return levels[0]
    groups = _groups(layer)
    if axis == 1:  # transposed convolution: output channels of one group, the same for all groups
        return levels.expand(groups, -1, -1)
    return levels.view(groups, -1, levels.shape[1])


def _groups(layer: Any) -> int:
    return layer.groups if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 1


def _kernel_axes(kernels: Tensor) -> tuple[int, ...]:
    return tuple(range(3, kernels.ndim))


def _draw(count: int, most: int) -> Tensor:
    """Return all of `count` indices, or `most` drawn at random with replacement."""
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=torch.Generator().manual_seed(0))


class _Dimension(NamedTuple):
    """One dimension of an input, and the places at which a kernel reads it.

    A transposed convolution reads as a convolution with stride 1 does whose input has its values
    `spacing` apart, with zeros between them.
    """

    size: int  # of the input
    padding: int  # zeros before the input
    spacing: int
    places: int
    stride: int
    offsets: Tensor  # of the kernel's taps


def _dimensions(layer: nn.modules.conv._ConvNd, sizes: torch.Size) -> list[_Dimension]:
    zeros = layer.padding_mode == "zeros"  # else, the input is padded already
    # Pairs (before, after) of each dimension; torch stores the last one first.
    pads = layer._reversed_padding_repeated_twice if zeros else [0] * 2 * len(sizes)
    dimensions = []
    for n, size in enumerate(sizes):
        stride, dilation = layer.stride[n], layer.dilation[n]
        reach = dilation * (layer.kernel_size[n] - 1)
        before, after = pads[-2 * n - 2], pads[-2 * n - 1]
        spacing = 1
        if isinstance(layer, TRANSPOSED):  # its padding crops the output
            before, after = reach - before, reach - after
            spacing, stride = stride, 1
        places = ((size - 1) * spacing + before + after - reach) // stride + 1
        offsets = dilation * torch.arange(layer.kernel_size[n])
        dimensions.append(_Dimension(size, before, spacing, places, stride, offsets))
    return dimensions


def _taps(dimensions: list[_Dimension], most: int) -> tuple[Tensor, Tensor]:
    """Return what a kernel's K taps read at about `most` places of an input [*L].

    Returns:
        [places, K] each: an index into the flattened input, and True if the tap reads the input
        there, False if it reads padding.
    """
    counts = [dimension.places for dimension in dimensions]
    drawn = torch.unravel_index(_draw(math.prod(counts), most), counts)
    index = torch.zeros(len(drawn[0]), 1, dtype=torch.int64)
    inside = torch.ones_like(index, dtype=torch.bool)
    for place, d in zip(drawn, dimensions, strict=True):
        position = d.stride * place[:, None] - d.padding + d.offsets
        value, between = position // d.spacing, position % d.spacing
        reads = (value >= 0) & (value < d.size) & (between == 0)
        index = (index[:, :, None] * d.size + torch.where(reads, value, 0)[:, None]).flatten(1)
        inside = (inside[:, :, None] & reads[:, None]).flatten(1)
    return index, inside
