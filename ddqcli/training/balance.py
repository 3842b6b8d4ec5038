"""Output channels of one size: their scales move into the BatchNorm that follows, at no cost.

A layer has one table of levels, and its channels may differ a hundredfold in size. A channel that
is divided by s fits the table better, and BatchNorm makes up for it:

    (y - mean) / sqrt(var + eps) = (y / s - mean / s) / sqrt((var + eps) / s^2)

So the running mean becomes mean / s and the running variance (var + eps) / s^2 - eps. The network
computes what it did, and the file has the same bytes. Nagel et al. (2019, arXiv 1906.04721, Sec.
4.1) balance the channels between two layers in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.seeding import seeded
from ddqcli.data.trees import Tree, call, copied, tensors
from ddqcli.qat.layer_config import CONVOLUTIONS, TRANSPOSED
from ddqcli.qat.layer_matrix import as_matrix, from_matrix
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.network_copy import copy_network
from ddqcli.qat.parameters import float_state

_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_MOST_SCALE = 256.0  # of a channel beside its layer; what is smaller does nothing
_TOLERANCE = 1e-4  # of the largest output


@dataclass(frozen=True)
class _Pair:
    """A layer and the normalization that makes up for the scales of its output channels."""

    layer: str
    norm: str
    module: nn.Module  # the layer
    eps: float  # of the normalization


@torch.no_grad()
def balance_channels(quantized: QuantizedModel, float_model: nn.Module, x: Tree) -> nn.Module:
    """Give the output channels of each layer one root mean square, where a BatchNorm allows it.

    A normalization belongs to a layer if no output of the float model changes when other scales of
    the layer's channels move into it.

    Args:
        quantized: changed in place; its quantizers are fitted anew. Layers that share a weight
            and layers that have levels by channel stay as they are.
        float_model: the network that `quantized` was made from. It stays as it is.
        x: inputs of a few samples, a tree of tensors [N, ...].

    Returns:
        A balanced copy of the float model.
    """
    weights = {
        t.places[0].layer: t
        for t in quantized.tensors
        if t.places[0].local == "weight" and len(t.places) == len(t.quantizer.bits) == 1
    }
    balanced = copy_network(float_model).eval()
    pairs = [pair for pair in _pairs(balanced, x) if pair.layer in weights]
    for model in (balanced, quantized.model):
        state = float_state(model, keep_vars=True)
        for pair in pairs:
            _divide(state, pair, _sizes(state, pair))
    for tensor in quantized.tensors:
        if tensor.places[0].layer in {pair.layer for pair in pairs}:
            tensor.quantizer.fit(tensor.parameter, tensor.quantizer.bits)
    return balanced


def _pairs(model: nn.Module, x: Tree) -> list[_Pair]:
    """Return the layers whose channels may have any scale, with their normalizations."""
    with suppress(Exception):  # a run can do without
        before = _outputs(model, x)
        candidates = _candidates(model, x)

        def unchanged(pairs: Sequence[_Pair]) -> bool:
            trial = copy_network(model)
            state, random = float_state(trial, keep_vars=True), torch.Generator().manual_seed(0)
            for pair in pairs:
                count = len(state[f"{pair.norm}.running_var"])
                # Powers of two, which round nothing, as different as clipped values have to show.
                exponents = torch.randint(-6, 7, (count,), generator=random)
                _divide(state, pair, torch.exp2(exponents.double()))
            return all(map(_is_same, _outputs(trial, x), before))

        if unchanged(candidates):
            return candidates
        return [pair for pair in candidates if unchanged([pair])]
    return []


def _candidates(model: nn.Module, x: Tree) -> list[_Pair]:
    """Return each normalization with the last layer called before it that has as many channels."""
    modules = dict(model.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, _LAYERS) or _has_statistics(m)]
    called: list[str] = []

    def remember(module: nn.Module, args: Any, output: Any, name: str) -> None:
        called.append(name)

    handles = [modules[n].register_forward_hook(partial(remember, name=n)) for n in names]
    try:
        call(model, copied(x))
    finally:
        for handle in handles:
            handle.remove()
    state = float_state(model, keep_vars=True)
    pairs, latest = [], dict[int, str]()  # last layer by its number of channels
    for name in called:
        module = modules[name]
        if isinstance(module, _LAYERS):
            latest[as_matrix(module, state[f"{name}.weight"]).shape[:2].numel()] = name
        elif layer := latest.get(len(state[f"{name}.running_var"])):
            pairs.append(_Pair(layer, name, modules[layer], float(module.eps)))  # type: ignore[arg-type]
    return pairs


def _has_statistics(module: nn.Module) -> bool:
    """True for BatchNorm, and for what may work like it."""
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return (
        isinstance(mean, Tensor)
        and isinstance(variance, Tensor)
        and mean.ndim == 1
        and mean.shape == variance.shape
        and isinstance(getattr(module, "eps", None), float)
    )


def _outputs(model: nn.Module, x: Tree) -> list[Tensor]:
    with seeded("balance"):  # some networks draw numbers in eval mode, too
        return tensors(call(model, copied(x)))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=_TOLERANCE * float(b.abs().max() if b.numel() else 0))


def _sizes(state: Mapping[str, Tensor], pair: _Pair) -> Tensor:
    """Return the root mean square of each output channel beside that of the layer: [C], float64."""
    weight = as_matrix(pair.module, state[f"{pair.layer}.weight"]).double()
    sizes = weight.square().mean(2).sqrt().flatten()
    scale = torch.where(sizes > 0, sizes / sizes.square().mean().sqrt(), 1.0)
    return scale.clamp(1 / _MOST_SCALE, _MOST_SCALE)


def _divide(state: Mapping[str, Tensor], pair: _Pair, scale: Tensor) -> None:
    """Divide a layer's output channels by `scale` [C], and make up for it.

    A scale that would leave no variance above eps is smaller.
    """
    weight, bias = state[f"{pair.layer}.weight"], state.get(f"{pair.layer}.bias")
    mean, var = (state[f"{pair.norm}.{name}"] for name in ("running_mean", "running_var"))
    scale = scale.to(var.device).minimum((var.double() / pair.eps + 1).sqrt())
    matrix = as_matrix(pair.module, weight).double()
    divided = matrix / scale.view(*matrix.shape[:2], 1)
    weight.copy_(from_matrix(pair.module, divided, weight.shape))
    for vector in (mean, bias):
        if vector is not None:
            vector.copy_(vector / scale)
    var.copy_(((var.double() + pair.eps) / scale.square() - pair.eps).clamp_min(0))
