"""Device and memory format of a model."""

from __future__ import annotations

import torch
from torch import nn

from ddqcli.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device for `train.device` (auto, cpu or cuda). Raises UsageError without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device is cuda, and no CUDA device is available here; use auto or cpu."
        )
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move the model to the device, in channels_last format if it has 2d convolutions.

    On CUDA, convolutions then give the same bytes each time, for all networks of this process.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    model = model.to(device)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model = model.to(memory_format=torch.channels_last)
    return model
