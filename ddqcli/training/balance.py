"""Output channels of one size: their scales move into the BatchNorm that follows, at no cost.

A layer has one table of levels, and its channels may differ a hundredfold in size. A channel that
is divided by s fits the table better, and BatchNorm makes up for it:

    (y - mean) / sqrt(var + eps) = (y / s - mean / s) / sqrt((var + eps) / s^2)

So the running mean becomes mean / s and the running variance (var + eps) / s^2 - eps. The network
computes what it did, and the file has the same bytes. Nagel et al. (2019, arXiv 1906.04721, Sec.
4.1) balance the channels between two layers in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddqcli.data.seeding import seeded
from ddqcli.data.trees import Tree, call, copied, tensors
from ddqcli.qat.layer_config import CONVOLUTIONS, TRANSPOSED
from ddqcli.qat.layer_matrix import as_matrix, from_matrix
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.network_copy import copy_network
from ddqcli.qat.norms import keeps_statistics
from ddqcli.qat.parameters import float_state

_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_MOST_SCALE = 256.0  # of a channel beside its layer; what is smaller does nothing
_MOST_EPS = 0.5  # share of the variance by which the part of eps in it may change
_PLACES = 1024  # values of an output that are compared
_TOLERANCE = 1e-4  # of the largest of them


@dataclass(frozen=True)
class _Pair:
    """A layer and the normalization that makes up for the scales of its output channels."""

    layer: str
    norm: str
    module: nn.Module  # the layer
    eps: float  # of the normalization


class _Call(NamedTuple):
    """A call of a module. That of the network, whose name is empty, is the last."""

    name: str
    outputs: list[Tensor]  # some values of each


@torch.no_grad()
def balance_channels(
    quantized: QuantizedModel, float_model: nn.Module, x: Tree, distilled: Collection[str] = ()
) -> nn.Module:
    """Give the output channels of each layer one root mean square, where a BatchNorm allows it.

    A normalization belongs to a layer if no output of the float model, nor of a module that is not
    between the two, changes when other scales of the layer's channels move into it.

    Args:
        quantized: changed in place; its quantizers are fitted anew. Layers that share a weight
            and layers that have levels by channel stay as they are; so do weights that are not the
            float model's: a run for a larger target has balanced and trained them.
        float_model: the network that `quantized` was made from. It stays as it is.
        x: inputs of a few samples, a tree of tensors [N, ...].
        distilled: modules whose outputs are compared with a teacher's, so that they stay the same.

    Returns:
        A balanced copy of the float model.
    """
    layers = {
        t.places[0].layer
        for t in quantized.tensors
        if t.places[0].local == "weight" and len(t.places) == len(t.quantizer.bits) == 1
    }
    balanced = copy_network(float_model).eval()
    pairs = [pair for pair in _pairs(balanced, x, distilled) if pair.layer in layers]
    floats, state = (float_state(m, keep_vars=True) for m in (balanced, quantized.model))
    for pair in pairs:
        scale, weight = _sizes(floats, pair), f"{pair.layer}.weight"
        if torch.equal(state[weight], floats[weight]):
            _divide(state, pair, scale)
        _divide(floats, pair, scale)
    scaled = {pair.layer for pair in pairs}
    for tensor in quantized.tensors:
        if tensor.places[0].layer in scaled:
            tensor.quantizer.fit(tensor.parameter, tensor.quantizer.bits)
    return balanced


def _pairs(model: nn.Module, x: Tree, distilled: Collection[str]) -> list[_Pair]:
    """Return the layers whose channels may have any scale, with their normalizations."""
    with suppress(Exception):  # a run can do without
        before = _calls(model, x)
        candidates = {
            pair: between
            for pair, between in _candidates(model, before).items()
            if not any(before[number].name in distilled for number in between)
        }

        def unchanged(pairs: list[_Pair]) -> bool:
            trial = copy_network(model)
            state, random = float_state(trial, keep_vars=True), torch.Generator().manual_seed(0)
            for pair in pairs:
                count = len(state[f"{pair.norm}.running_var"])
                # Powers of two, which round nothing, as different as clipped values have to show.
                exponents = torch.randint(-6, 7, (count,), generator=random)
                _divide(state, pair, torch.exp2(exponents.double()))
            between = {number for pair in pairs for number in candidates[pair]}
            after = _calls(trial, x)
            return len(after) == len(before) and all(
                number in between or _is_same(*calls)
                for number, calls in enumerate(zip(after, before, strict=True))
            )

        if unchanged(list(candidates)):
            return list(candidates)
        return [pair for pair in candidates if unchanged([pair])]
    return []


def _candidates(model: nn.Module, calls: list[_Call]) -> dict[_Pair, list[int]]:
    """Return each normalization with the last layer called before it that has as many channels.

    With each pair, the numbers of the calls between the layer's and the normalization's, the
    layer's included: their outputs may have any scale.
    """
    modules, state = dict(model.named_modules()), float_state(model, keep_vars=True)
    pairs: dict[_Pair, list[int]] = {}
    latest: dict[int, int] = {}  # call of the last layer by its number of channels
    for number, (name, _) in enumerate(calls):
        module = modules[name]
        if isinstance(module, _LAYERS):
            latest[as_matrix(module, state[f"{name}.weight"]).shape[:2].numel()] = number
        elif keeps_statistics(module) and isinstance(eps := getattr(module, "eps", None), float):
            first = latest.get(len(state[f"{name}.running_var"]))
            if first is not None:
                layer = calls[first].name
                pair = _Pair(layer, name, modules[layer], eps)
                pairs.setdefault(pair, []).extend(range(first, number))
    return pairs


def _calls(model: nn.Module, x: Tree) -> list[_Call]:
    """Return the calls of all modules in the order of their ends.

    A network's outputs alone do not tell: it may ignore a branch on some samples, as detectors do
    that find nothing.
    """
    calls: list[_Call] = []

    def remember(module: nn.Module, args: Any, output: Any, name: str) -> None:
        calls.append(_Call(name, [_some(values) for values in tensors(output)]))

    handles = [m.register_forward_hook(partial(remember, name=n)) for n, m in model.named_modules()]
    try:
        with seeded("balance"):  # some networks draw numbers in eval mode, too
            call(model, copied(x))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _some(x: Tensor) -> Tensor:
    """Return a copy of x, or of values at places that are the same for tensors of the same size."""
    values = x.flatten()
    if len(values) > _PLACES:
        random = torch.Generator().manual_seed(0)
        values = values[torch.randint(len(values), (_PLACES,), generator=random).to(x.device)]
    return values.to(torch.float64, copy=True)


def _is_same(a: _Call, b: _Call) -> bool:
    if a.name != b.name or [x.shape for x in a.outputs] != [x.shape for x in b.outputs]:
        return False
    return all(map(_is_close, a.outputs, b.outputs))


def _is_close(a: Tensor, b: Tensor) -> bool:
    finite = b[b.isfinite()].abs()
    limit = _TOLERANCE * float(finite.max()) if len(finite) else 0.0
    return torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True)


def _sizes(state: Mapping[str, Tensor], pair: _Pair) -> Tensor:
    """Return the root mean square of each output channel beside that of the layer: [C], float64."""
    weight = as_matrix(pair.module, state[f"{pair.layer}.weight"]).double()
    sizes = weight.square().mean(2).sqrt().flatten()
    scale = torch.where(sizes > 0, sizes / sizes.square().mean().sqrt(), 1.0)
    return scale.clamp(1 / _MOST_SCALE, _MOST_SCALE)


def _divide(state: Mapping[str, Tensor], pair: _Pair, scale: Tensor) -> None:
    """Divide a layer's output channels by `scale` [C], and make up for it.

    Where the variance of a channel is not far above eps, its scale is nearer to 1: training adds
    eps to the variance of the divided channel, as if it were eps * scale^2 before.
    """
    weight, bias = state[f"{pair.layer}.weight"], state.get(f"{pair.layer}.bias")
    mean, var = (state[f"{pair.norm}.{name}"] for name in ("running_mean", "running_var"))
    room = _MOST_EPS * (var.double() + pair.eps) / max(pair.eps, torch.finfo(torch.float64).tiny)
    scale = scale.to(var.device).square().clamp((1 - room).clamp_min(0), 1 + room).sqrt()
    matrix = as_matrix(pair.module, weight).double()
    divided = matrix / scale.view(*matrix.shape[:2], 1)
    weight.copy_(from_matrix(pair.module, divided, weight.shape))
    for vector in (mean, bias):
        if vector is not None:
            vector.copy_(vector / scale)
    var.copy_((var.double() + pair.eps) / scale.square() - pair.eps)
