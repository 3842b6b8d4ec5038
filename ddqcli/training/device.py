"""Device and memory format of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddqcli.data.load import Data
from ddqcli.data.seeding import seeded
from ddqcli.data.trees import call, copied, map_tensors, shared_length, sliced
from ddqcli.errors import UsageError
from ddqcli.qat.network_copy import copy_network

_SAMPLES = 8  # of a trial


def resolve_device(name: str) -> torch.device:
    """Return the device for `train.device` (auto, cpu or cuda). Raises UsageError without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device is cuda, and no CUDA device is available here; use auto or cpu."
        )
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def place_model(model: nn.Module, device: torch.device, *, contiguous: bool = False) -> nn.Module:
    """Move the model to the device, in channels_last format if it has 2d convolutions.

    With `contiguous`, in the usual format: see `needs_contiguous`. On CUDA, convolutions then give
    the same bytes each time, for all networks of this process.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    model = model.to(device)
    if contiguous:
        make_contiguous(model)
    elif any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model = model.to(memory_format=torch.channels_last)
    return model


def needs_contiguous(model: nn.Module, data: Data) -> bool:
    """True if the network, loss or metric fails at a view of images in channels_last format.

    `x.view(len(x), -1)` works for contiguous memory alone. `x.flatten(1)` copies if it must.
    """
    inputs, targets = next(iter(data.train.epoch(0)))
    if shared_length((inputs, targets)) is not None:
        inputs, targets = sliced((inputs, targets), slice(_SAMPLES))
    for training in (False, True):
        trial = copy_network(model).train(training)
        try:
            with torch.no_grad(), seeded("memory format"):
                output = call(trial, copied(inputs))
                data.loss(output, targets)
                data.metric(output, targets)
        except (Exception, SystemExit) as error:  # what else is wrong, the run will say
            if "view size is not compatible" in str(error):
                return True
    return False


def make_contiguous(model: nn.Module) -> None:
    """Give the model and its inputs the usual memory format, that of `needs_contiguous`."""
    model.to(memory_format=torch.contiguous_format)
    model.register_forward_pre_hook(_contiguous_inputs, with_kwargs=True)


def is_contiguous(model: nn.Module) -> bool:
    """True after `make_contiguous`."""
    return _contiguous_inputs in model._forward_pre_hooks.values()


def _contiguous_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return map_tensors(lambda x: x.contiguous(), (args, kwargs))
