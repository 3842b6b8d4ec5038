"""Build the network of a checkpoint: by name, by factory, or recognized by its keys and shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ddqcli.checkpoint.built_model import BuiltModel, call_architecture
from ddqcli.checkpoint.compiled import uncompiled
from ddqcli.checkpoint.read import Checkpoint
from ddqcli.checkpoint.state_fit import load_state
from ddqcli.checkpoint.torchvision_models import build_torchvision
from ddqcli.checkpoint.transformers_models import PREFIX, build_transformers
from ddqcli.errors import UsageError
from ddqcli.recipe.factory import import_factory

_TIMM = "timm"
_COMPILED = ", without torch.compile"


def build_model(
    checkpoint: Checkpoint, arch: str | None, kwargs: dict[str, Any], folder: Path | None = None
) -> BuiltModel:
    """Return the checkpoint's network with its weights.

    `arch` names a torchvision classifier, a network of timm (`timm:NAME`) or of transformers
    (`transformers:CLASS`, with its config.json in `folder`, by default beside the checkpoint), or a
    factory (`package.module:factory`); factories are called with `kwargs`. If it is None, the
    network is the module pickled in the checkpoint, or the torchvision classifier with the same
    keys and shapes. What shapes do not show, such as strides, is then torchvision's.

    Raises UsageError if no network can be built, CheckpointError if the weights do not fit it.
    """
    if arch is None and (unused := sorted(kwargs.keys() - {"num_classes"})):
        raise UsageError(
            f"Keyword arguments are given ({', '.join(unused)}) but no network to pass them to; "
            "name it with --arch."
        )
    if arch is None and checkpoint.module is not None:
        name = type(checkpoint.module).__name__
        note = f"{name}, the module pickled in the checkpoint"
        model, was_compiled = uncompiled(checkpoint.module)
        return BuiltModel(model.float().eval(), name, note + _COMPILED * was_compiled)
    if arch is not None and arch.startswith(PREFIX):
        folder = folder or checkpoint.path.parent
        model, note = build_transformers(checkpoint, arch, kwargs, folder)
        return BuiltModel(model.eval(), arch, arch + note)
    if arch is not None and ":" in arch:
        model, was_compiled = uncompiled(call_architecture(_factory(arch), arch, kwargs))
        note = arch + load_state(model, checkpoint.tensors, checkpoint.path, arch)
        return BuiltModel(model.float().eval(), arch, note + _COMPILED * was_compiled)
    return build_torchvision(checkpoint, arch, kwargs)


def _factory(arch: str) -> Callable[..., Any]:
    """Return the function that builds `arch`: a factory, or timm's with a name of its networks."""
    module, _, name = arch.partition(":")
    if module == _TIMM:
        return partial(import_factory(f"{_TIMM}:create_model"), name, pretrained=False)
    return import_factory(arch)
