"""The network of a checkpoint: by name, by factory, or found by its keys and shapes."""

from __future__ import annotations

from typing import Any

from ddqcli.checkpoint.built_model import BuiltModel, call_architecture
from ddqcli.checkpoint.read import Checkpoint
from ddqcli.checkpoint.state_fit import load_state
from ddqcli.checkpoint.torchvision_models import build_torchvision
from ddqcli.errors import UsageError
from ddqcli.recipe.factory import import_factory


def build_model(checkpoint: Checkpoint, arch: str | None, kwargs: dict[str, Any]) -> BuiltModel:
    """The checkpoint's network.

    `arch` is a torchvision classification network or a factory's spec, built with `kwargs`. Without it the network is
    the checkpoint's own pickled module, or else the torchvision network of the same keys and shapes; what shapes do
    not show (strides, activations) is then torchvision's. Raises UsageError where no network can be built and
    CheckpointError where the weights do not fit it.
    """
    if arch is None and (stray := sorted(kwargs.keys() - {"num_classes"})):
        raise UsageError(
            f"Keywords are given ({', '.join(stray)}) but not for which network; name it with --arch."
        )
    if arch is None and checkpoint.module is not None:
        name = type(checkpoint.module).__name__
        return BuiltModel(
            checkpoint.module.float().eval(), name, f"{name}, the module pickled in the checkpoint"
        )
    if arch is not None and ":" in arch:
        model = call_architecture(import_factory(arch), arch, kwargs)
        renamed = load_state(model, checkpoint.tensors, checkpoint.path, arch)
        return BuiltModel(model.float().eval(), arch, arch + renamed)
    return build_torchvision(checkpoint, arch, kwargs)
