"""Float model -> quantized model: which tensors are quantized, how, and what stays float and why.

A layer keeps its class and its forward; only what `layer.weight` and `layer.bias` return changes, through
torch.nn.utils.parametrize. So nothing is traced, and code that reads a weight past its layer's forward (attention does)
sees the quantized one too. A tensor that several layers share has one quantizer and is stored once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ddqcli.engine.plan import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, AttentionOutput, Plan, make_plans, weights_of
from ddqcli.errors import UsageError
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.quantizer import DDQuantizer, at_once
from ddqcli.recipe import Recipe

_BIASES = ("bias", "in_proj_bias")  # of the layers that have weights; quantized by Eqn (5)
BIASES_KEPT = "biases are kept in float (weights.bias_bits)"
_REPARAMETRIZED = ("weight_orig", "bias_orig", "weight_g", "weight_v")  # as torch's older hooks name what they keep


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
    """A model with its quantizers attached. `tensors`, `aliases` and `kept` name every entry of the float state dict."""

    model: nn.Module
    tensors: list[ConvertedTensor] = field(default_factory=list)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)  # by layer name
    aliases: dict[str, str] = field(default_factory=dict)  # shared tensors: name -> the name that is stored
    kept: dict[str, str] = field(default_factory=dict)  # what stays float: name, or "layer (input)" -> reason

    def float_tensors(self) -> dict[str, Tensor]:
        """Everything of the float state dict that is not quantized, by its float name, shared tensors once."""
        elsewhere = {t.name for t in self.tensors} | self.aliases.keys()
        return {name: value for name, value in float_state(self.model).items() if name not in elsewhere}

    def name_buffers(self) -> None:
        """Give the reason why buffers stay float, which a forward pass may have made. Raises UsageError for complex tensors."""
        for name, value in self.float_tensors().items():
            self.kept.setdefault(name, "a buffer: no gradient trains it")
            if value.is_complex():
                raise UsageError(
                    f"{name} holds {value.dtype}, which no exported file can; keep its real and imaginary part."
                )

    def at_once(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a training step: the quantizers' work, with few calls for all together."""
        inputs = [a.learned for a in self.activations.values() if a.learned is not None]
        return at_once([(t.quantizer, t.parameter) for t in self.tensors], inputs)

    def keep_input(self, name: str, reason: str) -> None:
        """Leave the layer's input in float after all."""
        self.model.get_submodule(name).input_quantizer = None
        del self.activations[name]
        self.kept[f"{name} (input)"] = reason


@dataclass(frozen=True)
class _Place:
    """One place where a parameter is found."""

    layer: str
    module: nn.Module
    local: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.local}" if self.layer else self.local


def convert(model: nn.Module, recipe: Recipe) -> Converted:
    """Attach a quantizer to every weight, bias and layer input that can have one, in place.

    Raises UsageError for a model that cannot be converted and for overrides that match nothing or contradict each other.
    """
    result = Converted(model, aliases=_aliases(model))
    plans = make_plans(model, recipe)
    layers: dict[int, _Place] = {}  # whose weight is quantized
    for parameter, places in _places(model):
        reasons = {p.name: _reason_to_keep(p, parameter, plans.get(p.layer), recipe) for p in places}
        name, reason = next(((name, why) for name, why in reasons.items() if why), (None, None))
        if reason is not None:
            first = places[0].name
            result.kept[first] = reason if name == first else f"shared with {name}: {reason}"
            continue
        tensor = _quantized(parameter, places, plans, recipe)
        for place in places:
            if not parametrize.is_parametrized(place.module, place.local):  # a layer may have two names
                parametrize.register_parametrization(place.module, place.local, tensor.quantizer, unsafe=True)
            if place.local not in _BIASES:
                layers.setdefault(id(place.module), place)
        result.tensors.append(tensor)
    if not result.tensors:
        reasons = list(result.kept.values())
        most = max(reasons, key=reasons.count, default="it has no parameters")
        raise UsageError(f"Nothing in this {kind_of(model)} can be quantized: {most}.")
    for place in layers.values():
        _quantize_input(result, place.layer, place.module, plans[place.layer].act_bits, recipe)
    result.name_buffers()
    if result.activations:
        forbid_nested_tensors(model)
    return result


def forbid_nested_tensors(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder from making them: only its fast path takes those, and hooks on inputs rule that out."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def kind_of(module: nn.Module) -> str:
    """The module's type as a reader would name it."""
    name = parametrize.type_before_parametrizations(module).__name__
    depthwise = isinstance(module, CONVOLUTIONS) and module.groups > 1 and module.groups == module.in_channels
    return f"depthwise {name}" if depthwise else name


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the float model's names: trained values in place of parametrizations, without quantizers."""
    renamed, of_quantizers = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (DDQuantizer, ActivationQuantizer)):
            of_quantizers.add(name)
        elif isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], DDQuantizer):
            layer, _, local = name.rpartition("parametrizations.")
            renamed[f"{name}.original"] = layer + local
    state = model.state_dict()
    floats = OrderedDict((renamed.get(n, n), v) for n, v in state.items() if n.rpartition(".")[0] not in of_quantizers)
    floats._metadata = state._metadata  # versions of the modules' states, which some models insist on (MNASNet)
    return floats


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
    state.update({name: state[target] for name, target in result.aliases.items()})
    return state


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of the state dict that mean the tensor of an earlier name. Raises UsageError for what cannot be stored."""
    if any(isinstance(m, (DDQuantizer, ActivationQuantizer)) for m in model.modules()):
        raise UsageError("The model is converted already; convert the float model.")
    first: dict[int, str] = {}
    aliases = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} of the model's state is a {type(value).__name__}; only tensors can be stored.")
        if is_lazy(value):
            raise UsageError(f"{name} has no shape yet; run the model on a batch before it is quantized.")
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


def _reason_to_keep(place: _Place, parameter: Tensor, plan: Plan | None, recipe: Recipe) -> str | None:
    """Why a parameter stays float at this place, or None if it can be quantized."""
    module, local, weights = place.module, place.local, weights_of(place.module)
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
    parameter: nn.Parameter, places: list[_Place], plans: dict[str, Plan], recipe: Recipe
) -> ConvertedTensor:
    """A parameter with its quantizer. Raises UsageError where its values, or the plans of its places, do not allow one."""
    first, plan = places[0], plans[places[0].layer]
    if not parameter.isfinite().all():
        raise UsageError(f"{first.name} holds NaN or infinite values; take a checkpoint from before training diverged.")
    start = parameter.detach().clone()
    if first.local in _BIASES:
        bits = recipe.weights.bias_bits or 8
        quantizer = DDQuantizer.from_tensor(parameter, bits, kind="uniform")
        return ConvertedTensor(first.name, "bias", parameter, quantizer, bits, bits, start)
    for place in places:
        if plans[place.layer] != plan:
            raise UsageError(f"{first.name} and {place.name} are one tensor: give both layers the same overrides.")
    axis = None
    if plan.granularity == "channel":
        axis = 1 if isinstance(first.module, TRANSPOSED) else 0
    quantizer = DDQuantizer.from_tensor(
        parameter, plan.max_bits, kind=plan.levels, channel_axis=axis, init=recipe.weights.init
    )
    return ConvertedTensor(first.name, kind_of(first.module), parameter, quantizer, plan.min_bits, plan.max_bits, start)


def _quantize_input(result: Converted, name: str, module: nn.Module, bits: int, recipe: Recipe) -> None:
    """Attach an activation quantizer to a layer."""
    if not bits or isinstance(module, EMBEDDINGS):
        return
    if isinstance(module, AttentionOutput):
        result.kept[f"{name} (input)"] = "attention reads this layer's weight past its forward"
        return
    result.activations[name] = ActivationQuantizer(bits, recipe.activations.levels)
    quantize_input(module, result.activations[name])


def quantize_input(module: nn.Module, quantizer: nn.Module) -> None:
    """Let the layer see its input through `quantizer` from now on, in place of an earlier one."""
    hooked = hasattr(module, "input_quantizer")
    module.register_module("input_quantizer", quantizer.to(next(module.parameters()).device))
    if not hooked:
        if type(module).forward is nn.MultiheadAttention.forward:
            module.register_forward_pre_hook(_attention_hook, with_kwargs=True)
        else:
            module.register_forward_pre_hook(_layer_hook, with_kwargs=True)
            module.register_forward_hook(_after_layer, always_call=True)


def _layer_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
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


def _attention_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Quantize query, key and value, each tensor once (self-attention gets the same one three times), and no mask."""
    names = ("query", "key", "value")
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    query, key, value = (given.pop(name) for name in names)
    quantizer = module.input_quantizer
    if quantizer is not None and quantizer.observing:  # the first tensor that it sees sets its range
        quantizer(torch.cat([x.flatten() for x in (query, key, value)]))
    q = _quantize(module, query)
    k = q if key is query else _quantize(module, key)
    v = q if value is query else k if value is key else _quantize(module, value)
    return (q, k, v, *args[3:]), given


def _quantize(module: nn.Module, x: Any) -> Any:
    quantizes = module.input_quantizer is not None and isinstance(x, Tensor) and x.is_floating_point()
    return module.input_quantizer(x) if quantizes else x
