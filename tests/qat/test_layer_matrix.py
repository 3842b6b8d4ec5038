"""A layer as a matrix: its patches times its matrix are the layer's own outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddqcli.qat.layer_matrix import as_matrix, channel_values, from_matrix, patches, row_levels

ALL = 10**9  # patches, more than there are

# Name -> layer and the shape of an input.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear on [B, C]": (nn.Linear(5, 3), (4, 5)),
    "linear on [B, T, C]": (nn.Linear(5, 3), (2, 7, 5)),
    "linear on [C]": (nn.Linear(5, 3), (5,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d, unbatched": (nn.Conv1d(4, 6, 3), (4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "conv2d, unbatched": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 8)),
    "conv2d, one patch": (nn.Conv2d(4, 6, (7, 8)), (1, 4, 7, 8)),
    "conv2d, unequal sides": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
        (2, 4, 9, 8),
    ),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6)),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, stride=2, groups=4), (2, 4, 7, 7)),
    "conv2d, same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), (2, 4, 9, 8)),
    "conv2d, valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 8)),
    "conv2d, reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d, circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 8)),
    "conv2d, replicate and same": (
        nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="replicate"),
        (2, 4, 7, 8),
    ),
    "conv3d": (
        nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
        (2, 4, 4, 5, 3),
    ),
    "transposed conv1d": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2), (2, 4, 5)),
    "transposed conv2d": (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=2),
        (2, 4, 5, 4),
    ),
    "transposed conv2d, depthwise": (nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 5, 4)),
    "transposed conv2d, cropped beyond the kernel": (
        nn.ConvTranspose2d(4, 6, 2, stride=2, padding=3),
        (2, 4, 6, 6),
    ),
    "transposed conv3d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 2, 3)),
}


def outputs_by_group(layer: Any, x: Tensor) -> Tensor:
    """The layer's own outputs without bias, as [G, O, P]."""
    with torch.no_grad():
        output = layer(x) - layer(torch.zeros_like(x))
    groups, kernel = getattr(layer, "groups", 1), getattr(layer, "kernel_size", ())
    if not kernel:
        return output.reshape(-1, output.shape[-1]).T[None]
    batch = output if output.ndim == len(kernel) + 2 else output[None]
    channels_first = batch.transpose(0, 1).flatten(1)
    return channels_first.reshape(groups, -1, channels_first.shape[1])


@pytest.mark.parametrize("name", LAYERS)
def test_matrix_times_patches_are_the_layers_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    layer = layer.double()
    weight: Any = layer.weight.detach()
    read = patches(layer, x, ALL)
    assert torch.allclose(as_matrix(layer, weight) @ read, outputs_by_group(layer, x))


@pytest.mark.parametrize("name", ["conv2d, unequal sides", "transposed conv2d", "conv2d, same"])
def test_channels_last_makes_no_difference(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, dtype=torch.float64)
    layer = layer.double()
    before = as_matrix(layer, layer.weight.detach()), patches(layer, x, ALL)
    layer = layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(as_matrix(layer, layer.weight.detach()), before[0])
    assert torch.equal(patches(layer, x, ALL), before[1])


def test_output_padding_adds_places_that_are_not_read() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False).double()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        inner = layer(x)[:, :, :-1, :-1].transpose(0, 1).flatten(1)
    assert torch.allclose(as_matrix(layer, layer.weight.detach()) @ patches(layer, x, ALL), inner)


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_becomes_the_weight_again(name: str) -> None:
    layer, _ = LAYERS[name]
    weight: Any = layer.weight.detach()
    matrix = as_matrix(layer, weight)
    assert torch.equal(from_matrix(layer, matrix.clone(), weight.shape), weight)


def test_attention_projects_its_input_by_one_matrix() -> None:
    attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    weight = attention.in_proj_weight.detach()
    projected = as_matrix(attention, weight) @ patches(attention, x, ALL)
    assert torch.allclose(projected, (x @ weight.T).flatten(0, 1).T[None])


# ---- drawn patches


@pytest.mark.parametrize(
    "name", ["linear on [B, T, C]", "conv2d, groups", "transposed conv2d", "conv2d, reflect"]
)
def test_drawn_patches_of_equal_shapes_are_pairs(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(4, *shape[1:])
    one, two = patches(layer, x, 8), patches(layer, 3 * x, 8)
    assert one.shape[2] == 8
    assert torch.equal(two, 3 * one)
    whole = {tuple(column) for column in patches(layer, x, ALL)[0].T.tolist()}
    assert {tuple(column) for column in one[0].T.tolist()} <= whole


def test_patches_are_drawn_over_the_whole_input() -> None:
    layer, x = nn.Linear(1, 1), torch.arange(1000.0)[:, None]
    drawn = patches(layer, x, 100).flatten()
    assert drawn.min() < 100
    assert drawn.max() > 900


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 3, 5, 6)])
def test_channel_values_are_those_of_each_channel(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = x.transpose(0, 1).flatten(1).sort(1).values
    assert torch.equal(channel_values(x, ALL).sort(1).values, expected)
    few = channel_values(x, 4)
    assert few.shape == (3, 4)
    for drawn, whole in zip(few.tolist(), expected.tolist(), strict=True):
        assert set(drawn) <= set(whole)


# ---- levels of the rows


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Linear(5, 6), 0),
        (nn.Conv2d(4, 6, 3, groups=2), 0),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 1),
    ],
)
def test_each_row_gets_the_levels_of_its_channel(layer: nn.Module, axis: int) -> None:
    """A weight made of its channel's number has a matrix made of its levels' number."""
    weight: Any = layer.weight.detach()
    tables = torch.arange(float(weight.shape[axis]))
    shape = [1] * weight.ndim
    shape[axis] = -1
    matrix = as_matrix(layer, tables.view(shape).expand_as(weight).contiguous())
    levels = row_levels(layer, tables[:, None].repeat(1, 3), axis)
    assert torch.equal(levels[:, :, :1].expand_as(matrix), matrix)


def test_one_table_is_for_all_rows() -> None:
    assert row_levels(nn.Linear(5, 6), torch.arange(3.0)[None], 0).shape == (3,)
