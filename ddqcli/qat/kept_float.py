"""Reasons why a parameter or a layer's input stays float; reports show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from ddqcli.qat.layer_config import EMBEDDINGS, AttentionOutput, LayerConfig, weight_names
from ddqcli.qat.parameters import Place, is_bias, kind_of

BIASES_KEPT = "biases are kept in float (weights.bias_bits)"
BUFFER = "a buffer: no gradient trains it"
INSIDE_ATTENTION = "attention reads this layer's weight past its forward"
NEVER_CALLED = "the layer's own forward is never called, so its input is not seen"

# Names under which torch's older hooks keep what they compute a weight from.
_REPARAMETRIZED = ("weight_orig", "bias_orig", "weight_g", "weight_v")


def reason_to_keep_float(
    parameter: nn.Parameter, places: Sequence[Place], configs: Mapping[str, LayerConfig]
) -> str | None:
    """Return why a parameter stays float, or None if it can be quantized at all of its places."""
    for place in places:
        reason = _reason_at(place, parameter, configs.get(place.layer))
        if reason is not None:
            return reason if place is places[0] else f"shared with {place.name}: {reason}"
    return None


def reason_to_keep_input_float(place: Place, configs: Mapping[str, LayerConfig]) -> str | None:
    """Return the reason a layer's input stays float despite `act_bits`.

    None if `act_bits` does not apply.
    """
    config = configs.get(place.layer)
    if config is None or not config.act_bits or isinstance(place.module, EMBEDDINGS):
        return None  # the input of an embedding are indices
    return INSIDE_ATTENTION if isinstance(place.module, AttentionOutput) else NEVER_CALLED


def _reason_at(place: Place, parameter: nn.Parameter, config: LayerConfig | None) -> str | None:
    module, local = place.module, place.local
    if isinstance(module, parametrize.ParametrizationList):
        remedy = "torch.nn.utils.parametrize.remove_parametrizations makes it a weight"
        return f"parametrized by the model itself; {remedy}"
    if local in _REPARAMETRIZED:
        return (
            "the layer's weight is computed from it (pruning, weight_norm, spectral_norm); "
            "make it a weight again"
        )
    if config and config.skip:
        return "an override says skip"
    weights = (*weight_names(module), *dict(config.named)) if config else ()
    if not (local in weights or (config and weight_names(module) and is_bias(local))):
        remedy = f'if it is a weight, {{match: "{place.name}", kind: Linear}} in overrides says so'
        kind = f"{kind_of(module)} {local}: no quantizer for this kind of parameter"
        return f"{kind}; {remedy}" if parameter.ndim > 1 else kind
    assert config is not None
    if not parameter.numel():
        return "holds no values"
    if parameter.dtype != torch.float32:
        remedy = "only float32 is quantized, which model.float() makes of other floating types"
        return f"holds {parameter.dtype}; {remedy}"
    if is_bias(local):
        return BIASES_KEPT if config.bias_bits is None else None
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return "max_norm changes it in place"
    return None
