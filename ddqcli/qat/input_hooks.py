"""Forward hooks through which a layer reads its input quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Attributes of a layer: its input's quantizer, and the hooks of a forward pass that is under way.
_QUANTIZER = "input_quantizer"
_SAVED_TENSORS_HOOKS = "_ddq_saved_tensors_hooks"

Args = tuple[Any, ...]
KwArgs = dict[str, Any]


def disable_nested_tensors(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder from making nested tensors.

    Only its fast path takes those, and hooks on inputs rule that path out.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def attach_input_quantizer(module: nn.Module, quantizer: nn.Module) -> None:
    """Let the layer read its input through `quantizer`, in place of an earlier one."""
    hooked = hasattr(module, _QUANTIZER)
    module.register_module(_QUANTIZER, quantizer.to(next(module.parameters()).device))
    if hooked:
        return
    if type(module).forward is nn.MultiheadAttention.forward:
        module.register_forward_pre_hook(_quantize_attention_inputs, with_kwargs=True)
    else:
        module.register_forward_pre_hook(_quantize_first_argument, with_kwargs=True)
        module.register_forward_hook(_leave_saved_tensors_hooks, always_call=True)


def remove_input_quantizer(module: nn.Module) -> None:
    """Let the layer read its input as it is."""
    module.register_module(_QUANTIZER, None)


def input_quantizer(module: nn.Module) -> nn.Module | None:
    """Return the quantizer of the layer's input, if it has one."""
    quantizer = getattr(module, _QUANTIZER, None)
    return quantizer if isinstance(quantizer, nn.Module) else None


def _quantize_first_argument(module: nn.Module, args: Args, kwargs: KwArgs) -> tuple[Args, KwArgs]:
    """Quantize the first argument, given by position or by name."""
    x: Any = args[0] if args else next(iter(kwargs.values()), None)
    quantized = _quantize(module, x)
    if quantized is not x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        hooks = _recompute_for_backward(input_quantizer(module), x, quantized)
        setattr(module, _SAVED_TENSORS_HOOKS, hooks)
        hooks.__enter__()
    if args:
        return (quantized, *args[1:]), kwargs
    return args, kwargs | {name: quantized for name in list(kwargs)[:1]}


def _leave_saved_tensors_hooks(module: nn.Module, args: Any, output: Any) -> None:
    hooks = getattr(module, _SAVED_TENSORS_HOOKS, None)
    if hooks is not None:
        hooks.__exit__()
        delattr(module, _SAVED_TENSORS_HOOKS)


def _recompute_for_backward(quantizer: Any, x: Tensor, quantized: Tensor) -> saved_tensors_hooks:
    """Save no copy of `quantized` for the backward pass: make it there again from x.

    The quantizer keeps x for its own backward pass anyway.
    """
    identity, source = _identity(quantized), x.detach()

    def pack(saved: Tensor) -> Any:
        return (saved.shape, saved.stride()) if _identity(saved) == identity else saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            recomputed: Tensor = quantizer(source)
        return recomputed.as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Return what views of one tensor's whole memory share until it is changed in place."""
    return x.data_ptr(), x.numel(), x.dtype, x._version


def _quantize_attention_inputs(
    module: nn.Module, args: Args, kwargs: KwArgs
) -> tuple[Args, KwArgs]:
    """Quantize query, key and value, and no mask.

    A tensor that is given twice (self-attention gives one three times) is quantized once.
    """
    names = ("query", "key", "value")
    others = {**kwargs, **dict(zip(names, args, strict=False))}
    query, key, value = (others.pop(name) for name in names)
    q = _quantize(module, query)
    k = q if key is query else _quantize(module, key)
    v = q if value is query else k if value is key else _quantize(module, value)
    return (q, k, v, *args[3:]), others


def _quantize(module: nn.Module, x: Any) -> Any:
    quantizer = input_quantizer(module)
    if quantizer is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return quantizer(x)
