"""Finding and building the torchvision network that a state dict belongs to."""

from __future__ import annotations

import difflib
import math
import re
import warnings
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
from ddqcli.recipe.factory import FACTORY_SPEC

_WITH_AUX = ("googlenet", "inception_v3")
_AUX_HEADS = ("aux1.", "aux2.", "AuxLogits.")
_OLD_NAMES = (  # in files torchvision itself publishes: of DenseNet, of the vision transformer
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"mlp\.linear_1\."), "mlp.0."),
    (re.compile(r"mlp\.linear_2\."), "mlp.3."),
)
_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_)


# ---- torchvision


def build_torchvision(
    checkpoint: Checkpoint, name: str | None, kwargs: dict[str, Any]
) -> BuiltModel:
    if name is not None and name not in _names():
        near = difflib.get_close_matches(name, _names(), n=3, cutoff=0.75)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(
            f"torchvision has no classification network {name!r}{hint}; one of your own, {FACTORY_SPEC}."
        )
    tensors = _current(checkpoint.tensors, keep_aux=bool(kwargs.get("aux_logits")))
    if name is None:
        found = ", found by its keys and shapes"
        name, kwargs = _discover(checkpoint.path, tensors, kwargs)
    else:
        found = ""
        kwargs, _ = _propose(name, tensors, kwargs)
    model = _torchvision(name, kwargs)
    renamed = load_state(model, tensors, checkpoint.path, name)
    note = f"torchvision {name} with {kwargs.get('num_classes', 1000)} classes{found}{renamed}"
    note += ", auxiliary heads left out" if len(tensors) < len(checkpoint.tensors) else ""
    if name in _WITH_AUX and "transform_input" not in kwargs:
        note += f" (torchvision's published weights need --arch {name} --set model.kwargs.transform_input=true)"
    return BuiltModel(model.float().eval(), name, note)


def _names() -> list[str]:
    return list(zoo.list_models(module=zoo))


def _current(tensors: Tensors, keep_aux: bool) -> Tensors:
    """The tensors under the names torchvision uses today, without the heads that only training from scratch uses."""
    kept = {name: t for name, t in tensors.items() if keep_aux or not name.startswith(_AUX_HEADS)}
    for old, new in _OLD_NAMES:
        kept = {old.sub(new, name): t for name, t in kept.items()}
    return kept


def _torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call_architecture(partial(zoo.get_model, name, weights=None), name, kwargs)


def _propose(
    name: str, tensors: Tensors, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], StateFit]:
    """`kwargs` and what the tensors say about the others, and how they fit the network so built."""
    kwargs = {**_visible(name, tensors), **kwargs}
    with _Blank():
        wanted = state_shapes(_torchvision(name, kwargs))
    fit = compare_state(align_names(tensors, wanted)[0], wanted)
    if fit.classes and "num_classes" not in kwargs:
        return {**kwargs, "num_classes": fit.classes}, replace(fit, reshaped={})
    return kwargs, fit


def _visible(name: str, tensors: Tensors) -> dict[str, Any]:
    """Keywords other than num_classes that can be told from the tensors."""
    if name in _WITH_AUX:
        return {"aux_logits": False, "init_weights": False}
    positions = tensors.get("encoder.pos_embedding")
    if (
        name.startswith("vit_")
        and positions is not None
        and positions.ndim == 3
        and positions.shape[1] > 1
    ):
        patch = int(name.rpartition("_")[2])  # pixels: 16 in vit_b_16
        return {"image_size": math.isqrt(positions.shape[1] - 1) * patch}
    return {}


class _Blank(TorchFunctionMode):
    """Within it, layers are built without memory or initial values, so that a network's shapes cost milliseconds.

    Unlike torch.device("meta") it leaves alone what constructors compute with, such as RegNet's widths.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def _discover(path: Path, tensors: Tensors, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The torchvision network of exactly these keys and shapes, and its keywords. Raises UsageError.

    Looks through one family: that whose first member has most names in common. No two networks have the same shapes (a
    test sees to it), so the first that fits is the one.
    """
    families: dict[str, list[str]] = {}
    for name in _names():
        families.setdefault(zoo.get_model_builder(name).__module__, []).append(name)
    likely = max(families.values(), key=lambda names: _propose(names[0], tensors, kwargs)[1].common)
    fits = {}
    for name in likely:
        proposed, fit = _propose(name, tensors, kwargs)
        if fit.exact:
            return name, proposed
        fits[name] = fit
    name, fit = max(fits.items(), key=lambda item: (item[1].same, -len(item[1].missing)))
    raise UsageError(
        f"{path} is no classification network of torchvision: the closest, {name}, has {fit.common + len(fit.missing)} "
        f"tensors, of which it has {fit.common}, {fit.same} in the same shape; say how to build it with --arch NAME or "
        "--arch path/to/file.py:factory."
    )
