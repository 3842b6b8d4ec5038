"""Forward hooks that quantize a layer's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def disable_nested_tensors(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder from making them: only its fast path takes those, and hooks on inputs rule that out."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def attach_input_quantizer(module: nn.Module, quantizer: nn.Module) -> None:
    """Let the layer see its input through `quantizer` from now on, in place of an earlier one."""
    hooked = hasattr(module, "input_quantizer")
    module.register_module("input_quantizer", quantizer.to(next(module.parameters()).device))
    if not hooked:
        if type(module).forward is nn.MultiheadAttention.forward:
            module.register_forward_pre_hook(_attention_hook, with_kwargs=True)
        else:
            module.register_forward_pre_hook(_layer_hook, with_kwargs=True)
            module.register_forward_hook(_after_layer, always_call=True)


def _layer_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Quantize the first argument, whether it has a name or not, and let the layer keep no copy of it for the backward."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    quantized = _quantize(module, x)
    if quantized is not x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        module._not_kept = _recomputing(module.input_quantizer, x, quantized)
        module._not_kept.__enter__()
    if args:
        return (quantized, *args[1:]), kwargs
    return args, kwargs | {name: quantized for name in list(kwargs)[:1]}


def _after_layer(module: nn.Module, args: Any, output: Any) -> None:
    if hasattr(module, "_not_kept"):
        module._not_kept.__exit__()
        del module._not_kept


def _recomputing(quantizer: nn.Module, x: Tensor, quantized: Tensor) -> Any:
    """Within: whatever is kept of `quantized` for the backward is made from x again there, which the quantizer keeps anyway."""
    identity, source = _identity(quantized), x.detach()

    def pack(kept: Tensor) -> Any:
        return (kept.shape, kept.stride()) if _identity(kept) == identity else kept

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            again: Tensor = quantizer(source)
        return again.as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _identity(x: Tensor) -> tuple[Any, ...]:
    """What views of one tensor's whole memory have in common, until it is changed in place."""
    return x.data_ptr(), x.numel(), x.dtype, x._version


def _attention_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Quantize query, key and value, each tensor once (self-attention gets the same one three times), and no mask."""
    names = ("query", "key", "value")
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    query, key, value = (given.pop(name) for name in names)
    quantizer = module.input_quantizer
    if (
        quantizer is not None and quantizer.observing
    ):  # the first tensor that it sees sets its range
        quantizer(torch.cat([x.flatten() for x in (query, key, value)]))
    q = _quantize(module, query)
    k = q if key is query else _quantize(module, key)
    v = q if value is query else k if value is key else _quantize(module, value)
    return (q, k, v, *args[3:]), given


def _quantize(module: nn.Module, x: Any) -> Any:
    quantizes = (
        module.input_quantizer is not None and isinstance(x, Tensor) and x.is_floating_point()
    )
    return module.input_quantizer(x) if quantizes else x
