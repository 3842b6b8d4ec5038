"""Distillation of features: the outputs of named layers (Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.trees import Tree, call, copied, tensors
from ddqcli.errors import DataError, UsageError
from ddqcli.formatting import did_you_mean
from ddqcli.training.distillation import squared_error


@contextmanager
def features_of(model: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the floating-point outputs of the layers in float32, in the order of their calls."""
    found: list[Tensor] = []

    def collect(_module: nn.Module, _inputs: Any, output: Tree) -> None:
        found.extend(x.float() for x in tensors(output) if x.is_floating_point())

    handles = [model.get_submodule(name).register_forward_hook(collect) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the sum of the features' squared errors, each over the variance of its target.

    Raises DataError if the features differ in number or shape from the teacher's.
    """
    shapes = [[list(x.shape) for x in each] for each in (features, targets)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"The outputs of train.distill.layers have the shapes {shapes[0]}, and the teacher's "
            f"have {shapes[1]}; name layers that give the same in both."
        )
    return torch.stack([squared_error(f, t) for f, t in zip(features, targets, strict=True)]).sum()


@torch.no_grad()
def check_features(
    model: nn.Module, teacher: nn.Module, layers: Sequence[str], inputs: Tree
) -> None:
    """Raise UsageError for unknown layers, DataError for layers whose outputs cannot be compared.

    Both networks are in eval mode.
    """
    given = []
    for name, network in (("the network", model), ("the teacher", teacher)):
        known = [each for each, _ in network.named_modules() if each]
        for layer in layers:
            if layer not in known:
                hint = did_you_mean(layer, known) or "; `ddq inspect MODEL` lists the layers."
                raise UsageError(f"train.distill.layers: {name} has no layer {layer}{hint}")
        with features_of(network, layers) as features:
            call(network, copied(inputs))
        given.append(features)
    if not given[0]:
        raise DataError(
            f"train.distill.layers: no forward of {', '.join(layers)} is called that gives "
            "floating-point tensors; name other layers."
        )
    feature_loss(*given)
