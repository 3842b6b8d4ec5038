"""Divergence: find the layer in which training produced NaN or infinite values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.trees import Tree, all_finite, call
from ddqcli.errors import DataError, DDQError


class Diverged(DDQError):
    """Training produced NaN or infinite values. The message names the step and the layer."""


@torch.no_grad()
def require_finite(tensors: Mapping[str, Tensor], what: str, when: str) -> None:
    """Raise Diverged if a tensor is not finite.

    Of several, the message names the last: gradients go wrong from the output backward.
    """
    norms = torch._foreach_norm(list(tensors.values()))
    if math.isfinite(float(torch.stack(norms).sum())):
        return
    for name, tensor in reversed(list(tensors.items())):
        if not tensor.isfinite().all():
            raise Diverged(f"{what} of {_float_name(name)} became NaN or infinite {when}")


def require_finite_batch(x: Tree, number: int, kind: str) -> None:
    """Raise DataError for inputs that are not finite; `kind` is training or evaluation."""
    if not all_finite(x):
        raise DataError(
            f"Batch {number} of the {kind} data holds NaN or infinite values; repair the data."
        )


@torch.no_grad()
def explain_loss(model: nn.Module, x: Tree, loss: float, when: str) -> DDQError:
    """Return the error for a loss that is not finite.

    A DDQError if the batch `x` is not finite. Otherwise Diverged, naming the first layer whose
    output is not.
    """
    if not all_finite(x):
        return DDQError(
            f"The batch {when} holds NaN or infinite values; repair the data and resume."
        )
    layer = _first_nonfinite_layer(model, x)
    where = f"first in {layer}" if layer else "although every layer's output is finite"
    return Diverged(f"The loss became {loss} {when}, {where}")


def _first_nonfinite_layer(model: nn.Module, x: Tree) -> str | None:
    nonfinite: list[str] = []

    def hook_for(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if not nonfinite and not all_finite(output):
                nonfinite.append(_float_name(name))

        return observe

    hooks = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if name
    ]
    call(model, x)
    for hook in hooks:
        hook.remove()
    return nonfinite[0] if nonfinite else None


def _float_name(name: str) -> str:
    """Return conv1.weight for conv1.parametrizations.weight.original."""
    layer, parametrized, rest = name.partition("parametrizations.")
    return layer + rest.partition(".")[0] if parametrized else name
