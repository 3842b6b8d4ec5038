"""Devices and memory formats."""

from __future__ import annotations

import torch
from torch import nn

from ddqcli.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device that train.device means. Raises UsageError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device is cuda, and no CUDA device is available here; use auto or cpu."
        )
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, in the memory format that is faster for images."""
    images = any(isinstance(m, nn.Conv2d) for m in model.modules())
    return model.to(device, memory_format=torch.channels_last) if images else model.to(device)
