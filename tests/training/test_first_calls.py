"""Hooks at the first call of a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddqcli.training.first_calls import FirstCalls


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_hooks_see_the_first_call_only_and_are_removed() -> None:
    model, x, inputs, outputs = Twice(), torch.randn(2, 4), [], []
    with FirstCalls(model, x) as calls:
        calls.on_input("layer", inputs.append)
        calls.on_output("layer", outputs.append)
        calls.run()
    model(x)
    assert torch.equal(torch.cat(inputs), x)
    assert torch.equal(torch.cat(outputs), model.layer(x))


def test_an_output_hook_replaces_the_output_unless_it_returns_none() -> None:
    model, x, seen = Twice(), torch.randn(2, 4), []
    with FirstCalls(model, x) as calls:
        calls.on_output("layer", torch.zeros_like)
        calls.on_output("", seen.append)
        calls.run()
    assert torch.equal(seen[0], model.layer(torch.zeros(2, 4)))


def test_a_failing_hook_does_not_stop_the_pass() -> None:
    def fail(x: Tensor) -> None:
        raise RuntimeError("unexpected")

    model, seen = Twice(), []
    with FirstCalls(model, torch.randn(2, 4)) as calls:
        calls.on_input("layer", fail)
        calls.on_output("layer", fail)
        calls.on_output("", seen.append)
        calls.run()
    assert len(seen) == 1


def test_a_failing_network_ends_the_pass_without_an_error() -> None:
    model, seen = Twice(), []
    with FirstCalls(model, torch.randn(2, 3)) as calls:
        calls.on_input("layer", seen.append)
        calls.run()
    assert len(seen) == 1
    assert not model.layer._forward_pre_hooks


class CallsAs(nn.Module):
    """Calls its attention as `call` says."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(4, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x)[0]


@pytest.mark.parametrize(
    ("call", "seen_inputs"),
    [
        (lambda layer, x: layer(x, x, x), 1),
        (lambda layer, x: layer(query=x, key=x, value=x), 1),
        (lambda layer, x: layer(x, key=x, value=x), 1),
        (lambda layer, x: layer(x, x, x + 1), 0),
        (lambda layer, x: layer(x, key=x + 1, value=x), 0),
        (lambda layer, x: layer(query=x, value=x, key=x.clone()), 0),
    ],
)
def test_attention_has_an_input_only_if_it_is_self_attention(call: Any, seen_inputs: int) -> None:
    seen: list[Tensor] = []
    with FirstCalls(CallsAs(call), torch.randn(5, 2, 4)) as calls:
        calls.on_input("attention", seen.append)
        calls.run()
    assert len(seen) == seen_inputs


def test_inputs_that_are_no_floating_point_tensors_are_left_out() -> None:
    model, seen = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)), []
    with FirstCalls(model, torch.arange(5)) as calls:
        calls.on_input("0", seen.append)
        calls.on_input("1", seen.append)
        calls.run()
    assert [x.shape for x in seen] == [(5, 3)]


def test_hooks_run_without_the_networks_autocast() -> None:
    class Autocast(Twice):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    dtypes = []
    with FirstCalls(Autocast(), torch.randn(2, 4)) as calls:
        calls.on_input("layer", lambda x: dtypes.append((x @ x.T).dtype))
        calls.on_output("layer", lambda x: dtypes.append(x.dtype))
        calls.run()
    assert dtypes == [torch.float32, torch.bfloat16]
