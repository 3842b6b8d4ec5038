"""Networks with weights, and the assertions on them, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ddqcli.checkpoint.read import Checkpoint
from ddqcli.errors import UsageError


def holding(tensors: dict[str, torch.Tensor], module: nn.Module | None = None) -> Checkpoint:
    return Checkpoint(
        Path("weights.pt"), "", {name: t.detach() for name, t in tensors.items()}, "", module
    )


def trained(model: nn.Module) -> nn.Module:
    """Change every tensor, so that none is as in a fresh model."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(
                torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else tensor + 1
            )
    return model


def assert_holds(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    assert not any(part.training for part in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def sentence(error: pytest.ExceptionInfo[UsageError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message
