"""A network built from a factory, before and after it holds the checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddqcli.errors import UsageError
from ddqcli.recipe.factory import user_errors


@dataclass(frozen=True)
class BuiltModel:
    """A model with the checkpoint's weights, in float32 and eval mode."""

    model: nn.Module
    arch: str
    note: str  # e.g. "torchvision resnet18 with 10 classes, found by its keys and shapes"


def call_architecture(factory: Callable[..., Any], what: str, kwargs: dict[str, Any]) -> nn.Module:
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    with user_errors(f"{what} called with ({given})"):
        model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{what} returned {type(model).__name__} where a torch.nn.Module is expected."
        )
    return model
