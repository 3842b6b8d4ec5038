"""A model with quantizers attached, and its state under the float model's names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.errors import UsageError
from ddqcli.qat.layer_config import CONVOLUTIONS
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
    start: Tensor  # float values before training

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def fixed(self) -> bool:
        return self.min_bits == self.max_bits


@dataclass
class QuantizedModel:
    """A model with its quantizers attached. `tensors`, `aliases` and `kept` name every entry of the float state dict."""

    model: nn.Module
    tensors: list[QuantizedParameter] = field(default_factory=list)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)  # by layer name
    aliases: dict[str, str] = field(
        default_factory=dict
    )  # shared tensors: name -> the name that is stored
    kept: dict[str, str] = field(
        default_factory=dict
    )  # what stays float: name, or "layer (input)" -> reason

    def float_tensors(self) -> dict[str, Tensor]:
        """Everything of the float state dict that is not quantized, by its float name, shared tensors once."""
        elsewhere = {t.name for t in self.tensors} | self.aliases.keys()
        return {
            name: value for name, value in float_state(self.model).items() if name not in elsewhere
        }

    def explain_buffers(self) -> None:
        """Give the reason why buffers stay float, which a forward pass may have made. Raises UsageError for complex tensors."""
        for name, value in self.float_tensors().items():
            self.kept.setdefault(name, "a buffer: no gradient trains it")
            if value.is_complex():
                raise UsageError(
                    f"{name} holds {value.dtype}, which no exported file can; keep its real and imaginary part."
                )

    def batched(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a training step: the quantizers' work, with few calls for all together."""
        inputs = [a.learned for a in self.activations.values() if a.learned is not None]
        return batched([(t.quantizer, t.parameter) for t in self.tensors], inputs)

    def keep_input_float(self, name: str, reason: str) -> None:
        """Leave the layer's input in float after all."""
        self.model.get_submodule(name).input_quantizer = None
        del self.activations[name]
        self.kept[f"{name} (input)"] = reason


def kind_of(module: nn.Module) -> str:
    """The module's type as a reader would name it."""
    name = parametrize.type_before_parametrizations(module).__name__
    depthwise = (
        isinstance(module, CONVOLUTIONS)
        and module.groups > 1
        and module.groups == module.in_channels
    )
    return f"depthwise {name}" if depthwise else name


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the float model's names: trained values in place of parametrizations, without quantizers."""
    renamed, of_quantizers = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (DDQuantizer, ActivationQuantizer)):
            of_quantizers.add(name)
        elif isinstance(module, parametrize.ParametrizationList) and isinstance(
            module[0], DDQuantizer
        ):
            layer, _, local = name.rpartition("parametrizations.")
            renamed[f"{name}.original"] = layer + local
    state = model.state_dict()
    floats = OrderedDict(
        (renamed.get(n, n), v)
        for n, v in state.items()
        if n.rpartition(".")[0] not in of_quantizers
    )
    floats._metadata = (
        state._metadata
    )  # versions of the modules' states, which some models insist on (MNASNet)
    return floats


def quantizers(result: QuantizedModel) -> Iterator[nn.Module]:
    """Every quantizer of the model once, weights' first."""
    yield from (t.quantizer for t in result.tensors)
    yield from result.activations.values()


@torch.no_grad()
def quantized_state(result: QuantizedModel) -> dict[str, Tensor]:
    """A state dict for the float architecture that holds the quantized values."""
    state = float_state(result.model)
    for tensor in result.tensors:
        state[tensor.name] = tensor.quantizer(tensor.parameter).detach()
    state.update({name: state[target] for name, target in result.aliases.items()})
    return state
