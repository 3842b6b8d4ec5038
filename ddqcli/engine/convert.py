"""Float model -> quantized model: which tensors are quantized, how, and what stays float and why.

A layer keeps its class and its forward; only what `layer.weight` and `layer.bias` return changes, through
torch.nn.utils.parametrize. So nothing is traced, and code that reads a weight past its layer's forward (attention does)
sees the quantized one too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.errors import UsageError
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.quantizer import DDQuantizer, Kind
from ddqcli.recipe import Override, Recipe

# What is quantized in a module of each type: weights by Eqn (3), biases by Eqn (5).
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTS: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    ((*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, nn.Embedding, nn.EmbeddingBag), ("weight",)),
    ((nn.MultiheadAttention,), ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
)
_BIASES = ("bias", "in_proj_bias")


@dataclass(frozen=True)
class ConvertedTensor:
    """One quantized weight or bias of the model."""

    name: str  # as in the float state dict: "layer1.0.conv1.weight"
    kind: str  # Conv2d, depthwise Conv2d, Linear, ...; "bias" for biases
    parameter: nn.Parameter  # the float values that training moves
    quantizer: DDQuantizer
    min_bits: int
    max_bits: int  # equal to min_bits: takes no part in the trade of bits
    start: Tensor  # float values before training

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def fixed(self) -> bool:
        return self.min_bits == self.max_bits


@dataclass
class Converted:
    """A model with its quantizers attached."""

    model: nn.Module
    tensors: list[ConvertedTensor] = field(default_factory=list)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)  # by layer name
    aliases: dict[str, str] = field(default_factory=dict)  # shared tensors: name -> the name that is stored
    kept: dict[str, str] = field(default_factory=dict)  # what stays float: name -> reason

    def float_tensors(self) -> dict[str, Tensor]:
        """Everything of the float state dict that is not quantized, by its float name."""
        quantized = {t.name for t in self.tensors}
        return {
            name: value
            for name, value in float_state(self.model).items()
            if name not in quantized and name not in self.aliases
        }


@dataclass(frozen=True)
class _Plan:
    """What the recipe says of one layer."""

    skip: bool
    levels: Kind
    granularity: str
    min_bits: int
    max_bits: int
    act_bits: int


def convert(model: nn.Module, recipe: Recipe) -> Converted:
    """Attach a quantizer to every weight and bias that can have one, in place. Raises UsageError for stray overrides."""
    result = Converted(model)
    seen: dict[int, tuple[str, DDQuantizer]] = {}
    matched: set[int] = set()
    for name, module in list(model.named_modules()):
        weights = next((w for types, w in _WEIGHTS if isinstance(module, types)), ())
        plan = _plan(recipe, name, module, matched)
        for local, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            full = f"{name}.{local}" if name else local
            is_bias = local in _BIASES and bool(weights)
            reason = _reason_to_keep(module, local, parameter, weights, is_bias, plan, recipe)
            if reason:
                result.kept[full] = reason
                continue
            if id(parameter) in seen:
                target, quantizer = seen[id(parameter)]
                result.aliases[full] = target
            else:
                quantizer = (
                    _bias_quantizer(parameter, recipe)
                    if is_bias
                    else _weight_quantizer(module, parameter, plan, recipe)
                )
                seen[id(parameter)] = (full, quantizer)
                bits = (recipe.weights.bias_bits or 8,) * 2 if is_bias else (plan.min_bits, plan.max_bits)
                kind = "bias" if is_bias else kind_of(module)
                start = parameter.detach().clone()
                result.tensors.append(ConvertedTensor(full, kind, parameter, quantizer, *bits, start))
            parametrize.register_parametrization(module, local, quantizer, unsafe=True)
        if weights and plan.act_bits and not plan.skip and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            activation = ActivationQuantizer(plan.act_bits, recipe.activations.levels)
            module.register_module("input_quantizer", activation)
            module.register_forward_pre_hook(_quantize_inputs)
            result.activations[name] = activation
    _check_overrides(recipe.overrides, matched)
    return result


def kind_of(module: nn.Module) -> str:
    """The module's type as a reader would name it."""
    name = next(cls.__name__ for cls in type(module).__mro__ if not cls.__name__.startswith("Parametrized"))
    depthwise = isinstance(module, _CONVOLUTIONS) and module.groups > 1 and module.groups == module.in_channels
    return f"depthwise {name}" if depthwise else name


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the float model's names: originals in place of parametrizations, without quantizers."""
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(".original"):
            name = name.replace("parametrizations.", "").removesuffix(".original")
        elif ".parametrizations." in f".{name}" or ".input_quantizer." in f".{name}":
            continue
        state[name] = value
    return state


def _quantize_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook: quantize the layer's floating-point inputs, each tensor once (attention gets the same one three times)."""
    done: dict[int, Any] = {}
    for x in inputs:
        if id(x) not in done:
            quantizes = isinstance(x, Tensor) and x.is_floating_point()
            done[id(x)] = module.input_quantizer(x) if quantizes else x
    return tuple(done[id(x)] for x in inputs)


def _plan(recipe: Recipe, name: str, module: nn.Module, matched: set[int]) -> _Plan:
    weights = recipe.weights
    found: dict[str, Any] = {
        "skip": False, "levels": weights.levels, "granularity": weights.granularity,
        "min_bits": weights.min_bits, "max_bits": weights.max_bits, "act_bits": recipe.activations.bits or 0,
    }  # fmt: skip
    for number, override in enumerate(recipe.overrides):
        if override.match is not None and not fnmatch.fnmatchcase(name, override.match):
            continue
        if override.type is not None and override.type not in {cls.__name__ for cls in type(module).__mro__}:
            continue
        matched.add(number)
        given = override.model_dump(exclude={"match", "type", "bits"}, exclude_none=True)
        found |= given
        if override.bits is not None:
            found |= {"min_bits": override.bits, "max_bits": override.bits}
    found["min_bits"] = min(found["min_bits"], found["max_bits"])
    return _Plan(**found)


def _reason_to_keep(
    module: nn.Module,
    local: str,
    parameter: Tensor,
    weights: tuple[str, ...],
    is_bias: bool,
    plan: _Plan,
    recipe: Recipe,
) -> str | None:
    """Why a parameter stays float, or None if it is to be quantized."""
    if not weights:
        return f"{kind_of(module)} {local}: no quantizer for this kind of parameter"
    if plan.skip:
        return "an override says skip"
    if is_bias:
        return "biases are kept in float (weights.bias_bits)" if recipe.weights.bias_bits is None else None
    if local not in weights:
        return f"{kind_of(module)} {local}: no quantizer for this kind of parameter"
    if not parameter.is_floating_point():
        return f"holds {parameter.dtype}, not floating-point values"
    if not parameter.numel():
        return "holds no values"
    return None


def _weight_quantizer(module: nn.Module, parameter: Tensor, plan: _Plan, recipe: Recipe) -> DDQuantizer:
    axis = None
    if plan.granularity == "channel":
        axis = 1 if isinstance(module, _TRANSPOSED) else 0
    return DDQuantizer.from_tensor(
        parameter, plan.max_bits, kind=plan.levels, channel_axis=axis, init=recipe.weights.init
    )


def _bias_quantizer(parameter: Tensor, recipe: Recipe) -> DDQuantizer:
    bits = recipe.weights.bias_bits or 8
    return DDQuantizer.from_tensor(parameter, bits, kind="uniform")


def _check_overrides(overrides: list[Override], matched: set[int]) -> None:
    stray = [o.match or o.type for number, o in enumerate(overrides) if number not in matched]
    if stray:
        raise UsageError(
            f"No layer matches the override{'s' * (len(stray) > 1)} {', '.join(map(str, stray))}; "
            "`ddq inspect MODEL` lists the layers' names."
        )


def quantizers(result: Converted) -> Iterator[nn.Module]:
    """Every quantizer of the model once, weights' first."""
    yield from (t.quantizer for t in result.tensors)
    yield from result.activations.values()


@torch.no_grad()
def quantized_state(result: Converted) -> dict[str, Tensor]:
    """A state dict for the float architecture that holds the quantized values."""
    state = float_state(result.model)
    for tensor in result.tensors:
        state[tensor.name] = tensor.quantizer(tensor.parameter).detach()
    for name, target in result.aliases.items():
        state[name] = state[target]
    return state
