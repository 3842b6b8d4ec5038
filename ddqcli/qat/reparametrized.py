"""Weights that a network computes from other tensors, such as weight_norm's: made plain weights.

Only a plain weight can be stored as indices and levels. The network's function stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from ddqcli.qat.parameters import attached_quantizer, parametrizations_of

# Hooks of torch's older functions, and what removes them.
_OLDER_HOOKS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "WeightNorm": remove_weight_norm,
    "SpectralNorm": remove_spectral_norm,
}


def make_plain(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Replace weights that the model computes from other tensors by plain ones; return their names.

    `wanted` tells which, by the name that the plain weight gets in the state dict. Quantizers stay.
    """
    changed = []
    for layer, module in model.named_modules():
        for local in [*_computed(module), *_older(module)]:
            name = f"{layer}.{local}" if layer else local
            if wanted(name):
                _replace(module, local)
                changed.append(name)
    return changed


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: deep copies share the one that torch made.

    Parametrizing one more tensor of a copy would otherwise change the original.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        attributes = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, attributes)


def _computed(module: nn.Module) -> list[str]:
    """Return the names of tensors under parametrizations of the model's own."""
    parametrizations = parametrizations_of(module)
    return [local for local, each in parametrizations.items() if not attached_quantizer(each)]


def _older(module: nn.Module) -> dict[str, Callable[[nn.Module, str], nn.Module]]:
    """Map each tensor that a hook of torch's older functions computes to what removes the hook."""
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    return {h.name: _OLDER_HOOKS[k] for h in hooks if (k := type(h).__name__) in _OLDER_HOOKS}


def _replace(module: nn.Module, local: str) -> None:
    if remove := _older(module).get(local):
        remove(module, local)
        _forget_older_state(module, local)
        return
    originals = list(parametrizations_of(module)[local].parameters(recurse=False))
    trained = any(original.requires_grad for original in originals)
    with torch.no_grad():
        value: Tensor = getattr(module, local).clone()
    own_class(module)
    for original in originals:
        original.requires_grad_(True)  # else, torch makes a buffer of the result
    parametrize.remove_parametrizations(module, local, leave_parametrized=True)
    setattr(module, local, nn.Parameter(value, requires_grad=trained))


def _forget_older_state(module: nn.Module, local: str) -> None:
    """Remove what remove_spectral_norm leaves: a hook that looks for its tensors in a file."""
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook: Any = getattr(wrapped, "hook", wrapped)
        if type(hook).__name__ == "SpectralNormLoadStateDictPreHook" and hook.fn.name == local:
            del hooks[key]
