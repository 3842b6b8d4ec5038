"""Float model -> quantized model: which tensors are quantized, how, and what stays float and why.

A layer keeps its class and its forward; only what `layer.weight` and `layer.bias` return changes, through
torch.nn.utils.parametrize. So nothing is traced, and code that reads a weight past its layer's forward (attention does)
sees the quantized one too. A tensor that several layers share has one quantizer and is stored once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ddqcli.errors import UsageError
from ddqcli.qat.input_hooks import attach_input_quantizer, disable_nested_tensors
from ddqcli.qat.layer_config import (
    EMBEDDINGS,
    TRANSPOSED,
    AttentionOutput,
    LayerConfig,
    layer_configs,
    weight_names,
)
from ddqcli.qat.model import QuantizedModel, QuantizedParameter, kind_of
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.quantizer import DDQuantizer
from ddqcli.recipe.schema import Recipe

_BIASES = ("bias", "in_proj_bias")  # of the layers that have weights; quantized by Eqn (5)
BIASES_KEPT = "biases are kept in float (weights.bias_bits)"
_REPARAMETRIZED = (
    "weight_orig",
    "bias_orig",
    "weight_g",
    "weight_v",
)  # as torch's older hooks name what they keep


@dataclass(frozen=True)
class _Place:
    """One place where a parameter is found."""

    layer: str
    module: nn.Module
    local: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.local}" if self.layer else self.local


def convert(model: nn.Module, recipe: Recipe) -> QuantizedModel:
    """Attach a quantizer to every weight, bias and layer input that can have one, in place.

    Raises UsageError for a model that cannot be converted and for overrides that match nothing or contradict each other.
    """
    result = QuantizedModel(model, aliases=_aliases(model))
    plans = layer_configs(model, recipe)
    layers: dict[int, _Place] = {}  # whose weight is quantized
    for parameter, places in _places(model):
        reasons = {
            p.name: _reason_to_keep(p, parameter, plans.get(p.layer), recipe) for p in places
        }
        name, reason = next(((name, why) for name, why in reasons.items() if why), (None, None))
        if reason is not None:
            first = places[0].name
            result.kept[first] = reason if name == first else f"shared with {name}: {reason}"
            continue
        tensor = _quantized(parameter, places, plans, recipe)
        for place in places:
            if not parametrize.is_parametrized(
                place.module, place.local
            ):  # a layer may have two names
                parametrize.register_parametrization(
                    place.module, place.local, tensor.quantizer, unsafe=True
                )
            if place.local not in _BIASES:
                layers.setdefault(id(place.module), place)
        result.tensors.append(tensor)
    if not result.tensors:
        reasons = list(result.kept.values())
        most = max(reasons, key=reasons.count, default="it has no parameters")
        raise UsageError(f"Nothing in this {kind_of(model)} can be quantized: {most}.")
    for place in layers.values():
        _quantize_input(result, place.layer, place.module, plans[place.layer].act_bits, recipe)
    result.explain_buffers()
    if result.activations:
        disable_nested_tensors(model)
    return result


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of the state dict that mean the tensor of an earlier name. Raises UsageError for what cannot be stored."""
    if any(isinstance(m, (DDQuantizer, ActivationQuantizer)) for m in model.modules()):
        raise UsageError("The model is converted already; convert the float model.")
    first: dict[int, str] = {}
    aliases = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name} of the model's state is a {type(value).__name__}; only tensors can be stored."
            )
        if is_lazy(value):
            raise UsageError(
                f"{name} has no shape yet; run the model on a batch before it is quantized."
            )
        if first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
    return aliases


def _places(model: nn.Module) -> list[tuple[nn.Parameter, list[_Place]]]:
    """Every parameter with all places where it is found."""
    found: dict[int, tuple[nn.Parameter, list[_Place]]] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), (parameter, []))[1].append(_Place(layer, module, local))
    return list(found.values())


def _reason_to_keep(
    place: _Place, parameter: Tensor, plan: LayerConfig | None, recipe: Recipe
) -> str | None:
    """Why a parameter stays float at this place, or None if it can be quantized."""
    module, local, weights = place.module, place.local, weight_names(place.module)
    if isinstance(module, parametrize.ParametrizationList):
        return "parametrized by the model itself; torch.nn.utils.parametrize.remove_parametrizations makes it a weight"
    if local in _REPARAMETRIZED:
        return "the layer's weight is computed from it (pruning, weight_norm, spectral_norm); make it a weight again"
    if plan and plan.skip:
        return "an override says skip"
    if plan is None or local not in (*weights, *_BIASES):
        return f"{kind_of(module)} {local}: no quantizer for this kind of parameter"
    if not parameter.numel():
        return "holds no values"
    if parameter.dtype != torch.float32:
        return f"holds {parameter.dtype}; only float32 is quantized, which model.float() makes of other floating types"
    if local in _BIASES:
        return BIASES_KEPT if recipe.weights.bias_bits is None else None
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return "max_norm changes it in place"
    if isinstance(module, EMBEDDINGS) and module.sparse:
        return "its gradients are sparse"
    return None


def _quantized(
    parameter: nn.Parameter, places: list[_Place], plans: dict[str, LayerConfig], recipe: Recipe
) -> QuantizedParameter:
    """A parameter with its quantizer. Raises UsageError where its values, or the plans of its places, do not allow one."""
    first, plan = places[0], plans[places[0].layer]
    if not parameter.isfinite().all():
        raise UsageError(
            f"{first.name} holds NaN or infinite values; take a checkpoint from before training diverged."
        )
    start = parameter.detach().clone()
    if first.local in _BIASES:
        bits = recipe.weights.bias_bits or 8
        quantizer = DDQuantizer.from_tensor(parameter, bits, kind="uniform")
        return QuantizedParameter(first.name, "bias", parameter, quantizer, bits, bits, start)
    for place in places:
        if plans[place.layer] != plan:
            raise UsageError(
                f"{first.name} and {place.name} are one tensor: give both layers the same overrides."
            )
    axis = None
    if plan.granularity == "channel":
        axis = 1 if isinstance(first.module, TRANSPOSED) else 0
    quantizer = DDQuantizer.from_tensor(
        parameter, plan.max_bits, kind=plan.levels, channel_axis=axis, init=recipe.weights.init
    )
    return QuantizedParameter(
        first.name, kind_of(first.module), parameter, quantizer, plan.min_bits, plan.max_bits, start
    )


def _quantize_input(
    result: QuantizedModel, name: str, module: nn.Module, bits: int, recipe: Recipe
) -> None:
    """Attach an activation quantizer to a layer."""
    if not bits or isinstance(module, EMBEDDINGS):
        return
    if isinstance(module, AttentionOutput):
        result.kept[f"{name} (input)"] = "attention reads this layer's weight past its forward"
        return
    result.activations[name] = ActivationQuantizer(bits, recipe.activations.levels)
    attach_input_quantizer(module, result.activations[name])
