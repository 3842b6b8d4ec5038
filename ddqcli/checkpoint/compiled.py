"""Undo torch.compile, whose wrappers rename layers and compile again as quantizers change."""

from __future__ import annotations

from torch import nn

_ORIGINAL = "_orig_mod"  # the submodule of torch.compile's wrapper


def uncompiled(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return the network without torch.compile, and True if any of it was compiled.

    Compiled parts inside are replaced in place.
    """
    plain = _original(model)
    found = plain is not model
    for module in list(plain.modules()):
        # module.compile() makes no wrapper.
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
            found = True
        for name, child in list(module._modules.items()):
            if child is not None and (original := _original(child)) is not child:
                setattr(module, name, original)
                found = True
    return plain, found


def _original(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, _ORIGINAL, None), nn.Module):
        module = inner
    return module
