"""Memory layouts: rows for the kernels, and no influence on results."""

from __future__ import annotations

import pytest
import torch
from quant_cases import normal, quantize, seeded

from ddqcli.quant.grid import representable_scale
from ddqcli.quant.layout import Rows


def test_one_tensor_becomes_a_row_for_each_group():
    x = normal(2, 3, 4)
    rows = Rows([x], 1, 3)
    assert torch.equal(rows.join([x]), x.transpose(0, 1).reshape(3, 8))
    assert torch.equal(rows.split(rows.join([x]))[0], x)
    scale = torch.ones(3, 1)
    assert rows.spread(scale)[0] is scale


def test_several_tensors_become_one_row_with_their_parameters_repeated():
    xs = [normal(2, 2), normal(3), normal(1, 2, 2, 2).contiguous(memory_format=torch.channels_last)]
    rows = Rows(xs, 0, 3)
    joined = rows.join([None, *xs[1:]])
    assert joined.shape == (1, 15)
    assert not joined[0, :4].any()
    for x, part in zip(xs[1:], rows.split(joined)[1:], strict=True):
        assert torch.equal(part, x)
        assert part.stride() == x.stride()
    (spread,) = rows.spread(torch.tensor([[1.0], [2.0], [3.0]]))
    assert spread.tolist() == [[1.0] * 4 + [2.0] * 3 + [3.0] * 8]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "every second", "half of the channels", "expanded"]
)
def test_the_memory_layout_changes_neither_values_nor_gradients(axis, layout):
    x = torch.randn(4, 4, 6, 6, generator=seeded(0))
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": torch.stack([x, -x], dim=-1)[..., 0],
        "half of the channels": torch.cat([x, x], 1)
        .contiguous(memory_format=torch.channels_last)
        .chunk(2, 1)[0],
        "expanded": x[:, :, :1].expand(4, 4, 6, 6),
    }
    strange = layouts[layout].detach().requires_grad_()
    plain = strange.detach().contiguous().requires_grad_()
    for bits in ((3,), (1, 2, 3, 4)):
        groups = len(bits)
        levels = (torch.rand(groups, 16, generator=seeded(1)) * 255).requires_grad_()
        scale = representable_scale(torch.full((groups,), 0.02))
        zero, gates = torch.full((groups,), 128.0), torch.ones(groups, 4)
        grad = torch.randn(4, 4, 6, 6, generator=seeded(2)).contiguous(
            memory_format=torch.channels_last
        )
        results = []
        for tensor in (plain, strange):
            out = quantize(tensor, levels, scale, zero, gates, bits, axis=axis, correction=0.1)
            results.append((out, *torch.autograd.grad(out, (tensor, levels), grad)))
        (out, grad_x, grad_levels), (out_2, grad_x_2, grad_levels_2) = results
        assert torch.equal(out, out_2)
        assert torch.equal(grad_x, grad_x_2)
        # Sums are taken in memory order.
        torch.testing.assert_close(grad_levels, grad_levels_2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "groups", "axis"),
    [
        ((0,), 1, 0),
        ((3, 0), 1, 0),
        ((3, 0), 3, 0),
        ((0, 3, 2), 3, 1),
        ((2, 3, 0, 0), 3, 1),
        ((), 1, 0),
        ((1,), 1, 0),
    ],
)
def test_empty_and_scalar_tensors_keep_their_shape(shape, groups, axis):
    x = torch.full(shape, -1.0).requires_grad_()  # below all levels
    levels = torch.arange(4.0).repeat(groups, 1).requires_grad_()
    one = torch.ones(groups)
    out = quantize(
        x, levels, one, 0 * one, torch.ones(groups, 2), (2,) * groups, axis=axis, correction=1.0
    )
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    # 1 from Eqn (8) and, for the distance of 1, 1 from Eqn (9).
    assert torch.equal(levels.grad.sum(), torch.tensor(2.0 * x.numel()))
