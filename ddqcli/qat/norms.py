"""BatchNorm as inference needs it: two vectors a layer, its scale and its shift.

    (x - mean) / sqrt(var + eps) * weight + bias  =  x * scale + shift

The file stores them as `weight` and `bias`. The statistics become constants that change nothing,
mean 0 and variance 1 - eps, so that the layer and its state dict stay what they were.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

FOLDED = "a statistic of BatchNorm, folded into its weight and bias: takes no bytes"

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"  # of training steps; inference never reads it
_RANKS = (4, 2, 3, 5)  # of inputs: images, features, sequences, volumes
_TOLERANCE = 1e-4  # of outputs near 1, which float32 computes to 1e-6


@dataclass(frozen=True)
class FoldedNorms:
    """New values for some tensors of the state dict, by name."""

    vectors: dict[str, Tensor]  # scales and shifts
    constants: dict[str, Tensor]  # the statistics; each of equal elements


def keeps_statistics(module: nn.Module) -> bool:
    """True for BatchNorm and what works like it: a mean and a variance for each channel."""
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)):
        return False
    return mean.ndim == 1 and mean.shape == variance.shape


@torch.no_grad()
def fold_norms(model: nn.Module, floats: Mapping[str, Tensor]) -> FoldedNorms:
    """Return the folded values of every normalization that can be folded; changes nothing.

    Folding a folded model returns the values that it has, bit for bit.

    Args:
        model: with quantizers attached or not.
        floats: its unquantized tensors by name. A layer is left as it is if one of its tensors is
            not among them or is shared with another layer, if they are not float32 or float64, or
            if its forward computes something else in eval mode.
    """
    vectors: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for layer, module in _norms(model, floats).items():
        prefix = f"{layer}." if layer else ""
        own = {local: floats[prefix + local] for local in _VECTORS}
        folded = _folded(own, float(module.eps))  # type: ignore[arg-type]
        vectors |= {prefix + local: folded[local] for local in _VECTORS[:2]}
        constants |= {prefix + local: folded[local] for local in _VECTORS[2:]}
    for layer, module in model.named_modules():
        name = f"{layer}.{_COUNTER}" if layer else _COUNTER
        if isinstance(module, _NormBase) and name in floats:
            constants[name] = torch.zeros_like(floats[name])
    return FoldedNorms(vectors, constants)


def _folded(own: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Return the four vectors [C] of a layer that computes the same with constant statistics."""
    weight, bias, mean, var = (own[local].double() for local in _VECTORS)
    constant = torch.full_like(own["running_var"], 1 - eps)
    factor = ((constant.double() + eps) / (var + eps)).sqrt()  # exactly 1 for a folded layer
    folded = weight * factor, bias - mean * weight / (var + eps).sqrt()
    vectors = [value.to(own["weight"].dtype) for value in folded]
    constants = torch.zeros_like(own["running_mean"]), constant
    return dict(zip(_VECTORS, [*vectors, *constants], strict=True))


def _norms(model: nn.Module, floats: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the layers that can be folded, by name."""
    modules = dict(model.named_modules())
    uses = Counter(
        id(tensor)
        for module in modules.values()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )
    found = {}
    for layer, module in modules.items():
        if not isinstance(getattr(module, "eps", None), float):
            continue  # before its weight is read, which a parametrization would compute
        own = [getattr(module, local, None) for local in _VECTORS]
        names = {f"{layer}.{local}" if layer else local for local in _VECTORS}
        if (
            all(isinstance(t, Tensor) and t.ndim == 1 and uses[id(t)] == 1 for t in own)
            and names <= floats.keys()
            and {t.dtype for t in own if t is not None} <= {torch.float32, torch.float64}
            and len({t.shape for t in own if t is not None}) == 1
            and _folds(module)
        ):
            found[layer] = module
    return found


def _folds(module: nn.Module) -> bool:
    """True if the layer computes the same with folded values; tried on a copy with random ones."""
    random = torch.Generator().manual_seed(0)
    try:
        twin = copy.deepcopy(module).eval()
    except Exception:  # it holds what cannot be copied
        return False
    channels = len(twin.weight)  # type: ignore[arg-type]
    own = {local: getattr(twin, local).data for local in _VECTORS}
    for local, tensor in own.items():
        low, high = (0.5, 2.0) if local == "running_var" else (-1.0, 1.0)
        tensor.copy_(torch.rand(channels, generator=random) * (high - low) + low)
    forward = type(module).forward  # without the hooks of the model
    for rank in _RANKS:
        x = torch.randn(2, channels, *[3] * (rank - 2), generator=random).to(own["weight"])
        try:
            before = forward(twin, x)
        except Exception:  # BatchNorm1d takes no images, for one
            continue
        for local, value in _folded(own, float(twin.eps)).items():  # type: ignore[arg-type]
            own[local].copy_(value)
        after = forward(twin, x)
        return torch.allclose(before, after, rtol=_TOLERANCE, atol=_TOLERANCE)
    return False
