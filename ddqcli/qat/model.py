"""A model with quantizers attached: its quantized parameters, its input quantizers, its floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddqcli.errors import UsageError
from ddqcli.qat.frozen import INPUT
from ddqcli.qat.input_hooks import input_quantizer, remove_input_quantizer
from ddqcli.qat.kept_float import (
    BUFFER,
    NEVER_CALLED,
    reason_to_keep_float,
    reason_to_keep_input_float,
)
from ddqcli.qat.layer_config import LayerConfig, attached_configs
from ddqcli.qat.norms import FOLDED, FoldedNorms, fold_norms
from ddqcli.qat.parameters import (
    Place,
    float_state,
    is_bias,
    kind_of,
    parameter_places,
    shared_names,
)
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.batched import batched
from ddqcli.quant.quantizer import DDQuantizer


@dataclass(frozen=True)
class QuantizedParameter:
    """One quantized weight or bias of the model."""

    name: str  # as in the float state dict: "layer1.0.conv1.weight"
    kind: str  # Conv2d, depthwise Conv2d, Linear, ...; "bias" for biases
    parameter: nn.Parameter  # the float values that training moves
    quantizer: DDQuantizer
    min_bits: int
    max_bits: int  # equal to min_bits: takes no part in the trade of bits
    offered: tuple[int, ...]  # bit-widths to choose from, ascending
    float_is_constant: bool = field(compare=False)  # all float values were equal before training
    places: Sequence[Place] = field(compare=False, repr=False)  # where the model reads it

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def fixed(self) -> bool:
        """True if min_bits == max_bits."""
        return self.min_bits == self.max_bits


@dataclass
class QuantizedModel:
    """A model and its quantizers.

    `tensors`, `aliases` and `kept_float` together name every entry of the float state dict.

    Attributes:
        model: the network, whose layers keep their classes.
        tensors: the quantized parameters, shared ones once.
        activations: input quantizers, by the layer's name.
        aliases: further name of a shared tensor -> the name under which it is stored.
        kept_float: name of what stays float, or layer + INPUT -> the reason.
    """

    model: nn.Module
    tensors: list[QuantizedParameter] = field(default_factory=list)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> QuantizedModel:
        """Find the quantizers in a converted model, in a copy of one, or in what contains one.

        Equals what `convert` returned for the model. Raises UsageError for a float model.
        """
        configs = attached_configs(model)

        def quantizer_or_reason(
            parameter: nn.Parameter, places: Sequence[Place]
        ) -> DDQuantizer | str:
            reason = reason_to_keep_float(parameter, places, configs)
            return places[0].quantizer or reason or "its quantizer was removed"

        def activation_quantizer(place: Place) -> ActivationQuantizer | None:
            quantizer = input_quantizer(place.module)
            return quantizer if isinstance(quantizer, ActivationQuantizer) else None

        quantized = cls.assemble(model, configs, quantizer_or_reason, activation_quantizer)
        if not quantized.tensors:
            raise UsageError(
                f"This {kind_of(model)} has no quantizers; ddqcli.quantize attaches them."
            )
        return quantized

    @classmethod
    def assemble(
        cls,
        model: nn.Module,
        configs: Mapping[str, LayerConfig],
        quantizer_or_reason: Callable[[nn.Parameter, Sequence[Place]], DDQuantizer | str],
        activation_quantizer: Callable[[Place], ActivationQuantizer | None],
    ) -> QuantizedModel:
        """List what of a model is quantized, and what stays float and why; changes nothing.

        Args:
            model: with its quantizers attached or not.
            configs: the settings of the layers.
            quantizer_or_reason: a parameter's quantizer, or the reason why it stays float.
            activation_quantizer: the quantizer of a layer's input, if it has one.

        Raises UsageError for tensors that no exported file can hold.
        """
        quantized = cls(model, aliases=shared_names(model))
        layers: dict[int, Place] = {}  # with a quantized weight
        for parameter, places in parameter_places(model):
            quantizer = quantizer_or_reason(parameter, places)
            if isinstance(quantizer, str):
                quantized.kept_float[places[0].name] = quantizer
                continue
            quantized.tensors.append(_quantized_parameter(parameter, places, quantizer, configs))
            for place in places:
                if not is_bias(place.local):
                    layers.setdefault(id(place.module), place)
        for place in layers.values():
            if activation := activation_quantizer(place):
                quantized.activations[place.layer] = activation
            elif reason := reason_to_keep_input_float(place, configs):
                quantized.kept_float[place.layer + INPUT] = reason
        quantized.explain_buffers()
        return quantized

    def float_tensors(self) -> dict[str, Tensor]:
        """Return everything of the float state dict that is not quantized, shared tensors once."""
        elsewhere = {t.name for t in self.tensors} | self.aliases.keys()
        state = float_state(self.model)
        return {name: value for name, value in state.items() if name not in elsewhere}

    def folded_norms(self) -> FoldedNorms:
        """Return the scales, shifts and constants that the file holds of BatchNorm."""
        return fold_norms(self.model, self.float_tensors())

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Compute with the values that the file holds of BatchNorm, so that these are measured."""
        norms, tensors = self.folded_norms(), self.float_tensors()
        before = {name: tensors[name].clone() for name in norms.vectors | norms.constants}
        try:
            _write(tensors, norms.vectors | norms.constants)
            yield
        finally:
            _write(tensors, before)

    def explain_buffers(self) -> None:
        """Add the buffers to `kept_float`; a forward pass may have made new ones.

        Raises UsageError for complex tensors.
        """
        constants = self.folded_norms().constants
        for name, value in self.float_tensors().items():
            self.kept_float.setdefault(name, FOLDED if name in constants else BUFFER)
            if value.is_complex():
                raise UsageError(
                    f"{name} holds {value.dtype}, which no exported file can; "
                    "keep its real and imaginary part."
                )

    def batched(self) -> AbstractContextManager[None]:
        """Precompute the quantizers' tables, step sizes and small weights for one training step.

        Goes around the forward and the backward pass.
        """
        weights = [(t.quantizer, t.parameter) for t in self.tensors]
        return batched(weights, self.activations.values())

    def keep_input_float(self, name: str, reason: str = NEVER_CALLED) -> None:
        """Remove the quantizer of a layer's input."""
        remove_input_quantizer(self.model.get_submodule(name))
        del self.activations[name]
        self.kept_float[name + INPUT] = reason


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


def quantizers(model: QuantizedModel) -> Iterator[DDQuantizer | ActivationQuantizer]:
    """Iterate over every quantizer of the model once, those of weights first."""
    yield from (t.quantizer for t in model.tensors)
    yield from model.activations.values()


@torch.no_grad()
def quantized_state(model: QuantizedModel) -> dict[str, Tensor]:
    """Return a state dict for the float architecture that holds the quantized values."""
    state = float_state(model.model)
    for tensor in model.tensors:
        state[tensor.name] = tensor.quantizer(tensor.parameter).detach()
    state.update({name: state[target] for name, target in model.aliases.items()})
    return state


def _quantized_parameter(
    parameter: nn.Parameter,
    places: Sequence[Place],
    quantizer: DDQuantizer,
    configs: Mapping[str, LayerConfig],
) -> QuantizedParameter:
    first = places[0]
    bias, config = is_bias(first.local), configs.get(first.layer)
    values, named = parameter.detach(), dict(config.named) if config else {}
    return QuantizedParameter(
        name=first.name,
        kind="bias" if bias else named.get(first.local) or kind_of(first.module),
        parameter=parameter,
        quantizer=quantizer,
        min_bits=quantizer.max_bits if bias or config is None else config.min_bits,
        max_bits=quantizer.max_bits,
        offered=(quantizer.max_bits,) if bias or config is None else config.offered,
        float_is_constant=bool((values == values.flatten()[:1]).all()),
        places=places,
    )
