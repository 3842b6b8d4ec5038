"""Call the function or class that builds a network, and what it results in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddqcli.errors import UsageError
from ddqcli.recipe.factory import user_errors


@dataclass(frozen=True)
class BuiltModel:
    """A network with the checkpoint's weights, in float32 and eval mode."""

    model: nn.Module
    arch: str
    note: str  # e.g. "torchvision resnet18 with 10 classes, found by its keys and shapes"


def call_architecture(factory: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Return the network that `factory` builds. Raises UsageError, calling the factory `name`."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    with user_errors(f"{name} called with ({arguments})"):
        model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{name} returned {type(model).__name__} where a torch.nn.Module is expected."
        )
    return model
