"""Checkpoint files, and the assertions on them, for the tests of reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.errors import CheckpointError


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def saved(path: Path, content: object, **kwargs: object) -> Path:
    torch.save(content, path, **kwargs)
    return path


def fault(path: Path, *, allow: bool = False) -> str:
    """Return the sentence with which load_checkpoint refuses `path`."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, pickle=allow)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
