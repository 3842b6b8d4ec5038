"""Build torchvision's classifiers, and recognize the one that a state dict belongs to."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models as zoo

from ddqcli.checkpoint.built_model import BuiltModel, call_architecture
from ddqcli.checkpoint.read import Checkpoint
from ddqcli.checkpoint.state_fit import (
    StateFit,
    Tensors,
    align_names,
    compare_state,
    load_state,
    state_shapes,
)
from ddqcli.errors import UsageError
from ddqcli.recipe.factory import FACTORY_SPEC, missing_function

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
_OLD_NAMES = (  # in files that torchvision itself publishes: DenseNet, VisionTransformer
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"mlp\.linear_1\."), "mlp.0."),
    (re.compile(r"mlp\.linear_2\."), "mlp.3."),
)
_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_)


def build_torchvision(
    checkpoint: Checkpoint, name: str | None, kwargs: dict[str, Any]
) -> BuiltModel:
    """Return torchvision's classifier `name`, or the one recognized by keys and shapes if None.

    Keyword arguments that `kwargs` leaves open, such as num_classes, follow from the weights.
    Raises UsageError for an unknown or unrecognized network, CheckpointError if weights do not fit.
    """
    if name is not None and name.endswith(".py"):
        raise UsageError(missing_function(Path(name)))
    if name is not None and name not in classifier_names():
        near = difflib.get_close_matches(name, classifier_names(), n=3, cutoff=0.75)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(
            f"torchvision has no classification network {name!r}{hint}; one of your own, "
            f"{FACTORY_SPEC}."
        )
    tensors = _current_names(checkpoint.tensors, keep_auxiliary=bool(kwargs.get("aux_logits")))
    recognized = name is None
    if name is None:
        name, kwargs = recognize(checkpoint.path, tensors, kwargs)
    else:
        kwargs, _ = _complete_kwargs(name, tensors, kwargs)
    model = _build(name, kwargs)
    prefix_note = load_state(model, tensors, checkpoint.path, name)
    note = f"torchvision {name} with {kwargs.get('num_classes', 1000)} classes"
    note += ", found by its keys and shapes" if recognized else ""
    note += prefix_note
    note += ", auxiliary heads left out" if len(tensors) < len(checkpoint.tensors) else ""
    if name in _WITH_AUXILIARY_HEADS and "transform_input" not in kwargs:
        option = f"--arch {name} --set model.kwargs.transform_input=true"
        note += f" (torchvision's published weights need {option})"
    return BuiltModel(model.float().eval(), name, note)


def classifier_names() -> list[str]:
    """Return the names of torchvision's classification networks."""
    return list(zoo.list_models(module=zoo))


def recognize(path: Path, tensors: Tensors, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and keyword arguments of the network with exactly these keys and shapes.

    Compares with the members of one family: the one whose first member shares most names. A test
    checks that no two networks have the same shapes, so the first that fits is the one.
    Raises UsageError, which names a network of mostly the same shapes; `path` is for that message.
    """
    families: dict[str, list[str]] = {}
    for name in classifier_names():
        families.setdefault(zoo.get_model_builder(name).__module__, []).append(name)

    def common_names(family: list[str]) -> int:
        return _complete_kwargs(family[0], tensors, kwargs)[1].common

    fits = {}
    for name in max(families.values(), key=common_names):
        complete, fit = _complete_kwargs(name, tensors, kwargs)
        if fit.exact:
            return name, complete
        fits[name] = fit
    name, fit = max(fits.items(), key=lambda item: (item[1].matching, -len(item[1].missing)))
    wanted = fit.common + len(fit.missing)
    closest = ""
    if 2 * fit.matching > wanted:  # a poor match tells nothing
        closest = (
            f": the closest, {name}, has {wanted} tensors, of which it has {fit.common}, "
            f"{fit.matching} in the same shape"
        )
    raise UsageError(
        f"{path} is no classification network of torchvision{closest}; say how to build it with "
        "--arch NAME or --arch path/to/file.py:factory."
    )


class ShapesOnly(TorchFunctionMode):
    """Build layers without memory or initial values: a network's shapes then cost milliseconds.

    Unlike torch.device("meta") it leaves alone what constructors compute with, such as RegNet's
    widths.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def _current_names(tensors: Tensors, keep_auxiliary: bool) -> Tensors:
    """Rename tensors of older torchvision versions; drop heads that serve training from scratch."""
    current = {
        name: tensor
        for name, tensor in tensors.items()
        if keep_auxiliary or not name.startswith(_AUXILIARY_HEADS)
    }
    for old, new in _OLD_NAMES:
        current = {old.sub(new, name): tensor for name, tensor in current.items()}
    return current


def _build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call_architecture(partial(zoo.get_model, name, weights=None), name, kwargs)


def _complete_kwargs(
    name: str, tensors: Tensors, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], StateFit]:
    """Add keyword arguments that follow from the tensors; also return the fit of that network."""
    kwargs = {**_kwargs_from_shapes(name, tensors), **kwargs}
    with ShapesOnly():
        wanted = state_shapes(_build(name, kwargs))
    fit = compare_state(align_names(tensors, wanted)[0], wanted)
    if fit.classes and "num_classes" not in kwargs:
        return {**kwargs, "num_classes": fit.classes}, replace(fit, mismatched={})
    return kwargs, fit


def _kwargs_from_shapes(name: str, tensors: Tensors) -> dict[str, Any]:
    """Return keyword arguments, num_classes aside, that the tensors of network `name` imply."""
    if name in _WITH_AUXILIARY_HEADS:
        return {"aux_logits": False, "init_weights": False}
    positions = tensors.get("encoder.pos_embedding")  # [1, 1 + patches, C]
    if not name.startswith("vit_") or positions is None:
        return {}
    if positions.ndim != 3 or positions.shape[1] < 2:
        return {}
    patch_size = int(name.rpartition("_")[2])  # pixels: 16 in vit_b_16
    return {"image_size": math.isqrt(positions.shape[1] - 1) * patch_size}
