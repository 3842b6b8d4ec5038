"""Float model -> quantized model: attach a quantizer to every weight, bias and layer input.

A layer keeps its class and its forward; only what `layer.weight` and `layer.bias` return changes,
through torch.nn.utils.parametrize. So nothing is traced, and code that reads a weight past its
layer's forward (attention does) gets the quantized one too. A tensor that several layers share has
one quantizer and is stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ddqcli.errors import UsageError
from ddqcli.qat.input_hooks import (
    attach_input_quantizer,
    disable_nested_tensors,
    remove_input_quantizer,
)
from ddqcli.qat.kept_float import reason_to_keep_float
from ddqcli.qat.layer_config import (
    EMBEDDINGS,
    TRANSPOSED,
    AttentionOutput,
    LayerConfig,
    attach_config,
    layer_configs,
    weight_names,
)
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.parameters import Place, is_bias, kind_of
from ddqcli.qat.recurrent import forget_read_weights
from ddqcli.qat.reparametrized import own_class
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.quantizer import DDQuantizer
from ddqcli.recipe.schema import Recipe


def convert(model: nn.Module, recipe: Recipe) -> QuantizedModel:
    """Attach a quantizer to every weight, bias and layer input that can have one, in place.

    Raises UsageError as `prepare` does, and then leaves the model as it was.
    """
    quantized = prepare(model, recipe)
    attach(quantized, recipe)
    return quantized


def prepare(model: nn.Module, recipe: Recipe) -> QuantizedModel:
    """Fit the quantizers of a float model without attaching them.

    Raises UsageError for a model that cannot be converted, and for overrides that match nothing or
    contradict each other.
    """
    _check_convertible(model)
    configs = layer_configs(model, recipe)

    def quantizer_or_reason(parameter: nn.Parameter, places: Sequence[Place]) -> DDQuantizer | str:
        reason = reason_to_keep_float(parameter, places, configs)
        return reason or _fitted_quantizer(parameter, places, configs, recipe)

    def activation_quantizer(place: Place) -> ActivationQuantizer | None:
        bits = configs[place.layer].act_bits
        if not bits or isinstance(place.module, (*EMBEDDINGS, AttentionOutput)):
            return None
        return ActivationQuantizer(bits, recipe.activations.levels)

    quantized = QuantizedModel.assemble(model, configs, quantizer_or_reason, activation_quantizer)
    if not quantized.tensors:
        # Of the largest parameter, which is a weight if any is.
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        largest = max(quantized.kept_float, key=lambda name: sizes.get(name, -1), default="")
        reason = quantized.kept_float.get(largest, "it has no parameters")
        place = f"{largest}: " * bool(largest)
        raise UsageError(f"Nothing in this {kind_of(model)} can be quantized: {place}{reason}.")
    return quantized


def attach(quantized: QuantizedModel, recipe: Recipe) -> None:
    """Make the model read its parameters and inputs through the quantizers of `prepare`."""
    for layer, config in layer_configs(quantized.model, recipe).items():
        attach_config(quantized.model.get_submodule(layer), config)
    for module in quantized.model.modules():
        if isinstance(module, EMBEDDINGS):
            # No gradient passes a quantizer, or reaches Adam, as a sparse one.
            module.sparse = False
    for tensor in quantized.tensors:
        for module, local in _distinct(tensor.places):
            own_class(module)
            if local in weight_names(module)[:1]:
                forget_read_weights(module)
            parametrize.register_parametrization(module, local, tensor.quantizer, unsafe=True)
    for layer, quantizer in quantized.activations.items():
        attach_input_quantizer(quantized.model.get_submodule(layer), quantizer)
    if quantized.activations:
        disable_nested_tensors(quantized.model)


def detach(quantized: QuantizedModel) -> None:
    """Undo `attach`: the model computes with its float parameters and inputs again."""
    for tensor in quantized.tensors:
        for module, local in _distinct(tensor.places):
            parametrize.remove_parametrizations(module, local, leave_parametrized=False)
    for layer in quantized.activations:
        remove_input_quantizer(quantized.model.get_submodule(layer))


def _distinct(places: Sequence[Place]) -> list[tuple[nn.Module, str]]:
    """Return the places without repetition: one module may have several names."""
    return list({(id(p.module), p.local): (p.module, p.local) for p in places}.values())


def _check_convertible(model: nn.Module) -> None:
    """Raise UsageError for a converted model and for a state that no exported file can hold."""
    if any(isinstance(m, (DDQuantizer, ActivationQuantizer)) for m in model.modules()):
        raise UsageError("The model is already quantized; pass the float model.")
    for name, module in model.named_modules():
        # Its first call changes its class, even if a state dict has given it its shape.
        if isinstance(module, LazyModuleMixin):
            raise UsageError(
                f"{name or 'The model'} is a {type(module).__name__}, which has no shape yet; run "
                "the model on a batch where it is built, before it is quantized."
            )
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name} of the model's state is a {type(value).__name__}; "
                "only tensors can be stored."
            )


def _fitted_quantizer(
    parameter: nn.Parameter,
    places: Sequence[Place],
    configs: Mapping[str, LayerConfig],
    recipe: Recipe,
) -> DDQuantizer:
    """Return a quantizer fitted to the parameter at its most bits.

    Raises UsageError for values that are not finite and for places whose settings differ.
    """
    first, config = places[0], configs[places[0].layer]
    if not parameter.isfinite().all():
        raise UsageError(
            f"{first.name} holds NaN or infinite values; "
            "take a checkpoint from before training diverged."
        )
    if is_bias(first.local):
        return DDQuantizer.from_tensor(parameter, config.bias_bits or 8, kind="uniform")
    for place in places:
        if configs[place.layer] != config:
            raise UsageError(
                f"{first.name} and {place.name} are one tensor: "
                "give both layers the same overrides."
            )
    axis = None
    if config.granularity == "channel":
        axis = 1 if isinstance(first.module, TRANSPOSED) else 0
    return DDQuantizer.from_tensor(
        parameter, config.max_bits, kind=config.levels, channel_axis=axis, init=recipe.weights.init
    )
