"""A user's own loss: a function of outputs and targets, whose faults are reported as its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddqcli.data.classification import Score
from ddqcli.data.trees import tensors
from ddqcli.errors import DataError, DDQError

_NEEDED = "it must return the mean loss of the batch as a tensor of one value"
ARGUMENTS = {  # of the functions of a factory
    "loss": "(output, target)",
    "metric": "(output, target)",
    "distill": "(output, float_output)",
}


def own_loss(function: Score, spec: str, kind: str = "loss") -> Score:
    """Wrap the loss of a factory: raise DataError unless it returns one value with a gradient.

    `kind` is its key in what the factory returned.
    """

    def checked(output: Any, target: Any) -> Tensor:
        loss = call_own(function, kind, spec, output, target, _NEEDED)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            is_tensor = isinstance(loss, Tensor)
            given = f"shape {list(loss.shape)}" if is_tensor else f"a {type(loss).__name__}"
            raise DataError(f"The {kind} of {spec} returned {given}; {_NEEDED}.")
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors(output))
        if trained and not loss.requires_grad:
            raise DataError(
                f"The {kind} of {spec} returned a value without a gradient; compute it from the "
                "output by functions of torch, without detach(), item() or NumPy."
            )
        return loss

    return checked


def call_own(function: Score, kind: str, spec: str, output: Any, target: Any, needed: str) -> Any:
    """Return `function(output, target)`, a factory's loss, metric or distill, which `kind` says.

    Raises DataError with what is `needed` if it fails, and lets a lack of memory pass.
    """
    try:
        return function(output, target)
    except (DDQError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())[:200]
        if "allocate memory" in message:
            raise
        raise DataError(
            f"The {kind} of {spec} failed on {ARGUMENTS[kind]} of a batch: {type(error).__name__}: "
            f"{message.rstrip('.')}; {needed}; `ddq --debug ...` shows where."
        ) from error
