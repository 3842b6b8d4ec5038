"""Recurrent layers of torch keep the weights that they read; quantized ones must not."""

from __future__ import annotations

from typing import Any

from torch import nn


def forget_read_weights(module: nn.Module) -> None:
    """Let a recurrent layer forget the quantized weights after each forward pass.

    They belong to the graph of that pass, with which the layer could not be copied.
    """
    if isinstance(module, nn.RNNBase):
        module.register_forward_hook(_forget)


def _forget(module: Any, args: Any, output: Any) -> None:
    module._flat_weights = [None if w is None else w.detach() for w in module._flat_weights]
    # The layer compares what these return with its weights, and reads those that differ.
    module._flat_weight_refs = [_nothing] * len(module._flat_weights)


def _nothing() -> None:
    return None
