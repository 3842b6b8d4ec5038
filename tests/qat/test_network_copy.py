"""A network that keeps what it computed last can be copied, with its values and shared tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ddqcli.qat.network_copy import copy_network


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.tied = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        self.pyramid = [self.last, 2 * self.last]
        return self.last


def test_a_copy_has_the_values_that_the_network_keeps_and_no_graph() -> None:
    net = Keeps()
    expected = net(torch.randn(4, 3)).detach().clone()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(net)
    twin = copy_network(net)
    assert torch.equal(twin.last, expected)
    assert torch.equal(twin.pyramid[1], 2 * expected)
    assert twin.last is twin.pyramid[0]
    assert twin.last.grad_fn is None
    assert net.last.grad_fn is not None


def test_a_copy_shares_no_memory_and_keeps_what_is_shared_within() -> None:
    net = Keeps()
    net(torch.randn(4, 3))
    twin = copy_network(net)
    assert twin.tied is twin.layer.weight
    assert isinstance(twin.tied, nn.Parameter)
    assert twin.tied.requires_grad
    kept = [t.data_ptr() for t in (net.last, net.layer.weight)]
    assert {t.data_ptr() for t in (twin.last, twin.layer.weight)}.isdisjoint(kept)
