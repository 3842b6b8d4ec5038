"""Parameters and state of a model under their float names, with or without quantizers attached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.qat.layer_config import CONVOLUTIONS
from ddqcli.quant.activation import ActivationQuantizer
from ddqcli.quant.quantizer import DDQuantizer

_BIASES = ("bias", "in_proj_bias", "bias_k", "bias_v")
_RECURRENT_BIASES = ("bias_ih", "bias_hh")  # beginnings of names


@dataclass(frozen=True)
class Place:
    """An attribute of a module that is a parameter; a shared parameter has several places."""

    layer: str  # name of the module
    module: nn.Module
    local: str  # name of the attribute

    @property
    def name(self) -> str:
        """The name in the float model's state dict."""
        return f"{self.layer}.{self.local}" if self.layer else self.local

    @property
    def quantizer(self) -> DDQuantizer | None:
        """The quantizer that is attached here, if any."""
        parametrizations = parametrizations_of(self.module).get(self.local)
        return attached_quantizer(parametrizations) if parametrizations else None


def is_bias(local: str) -> bool:
    """True for a bias of a layer that has weights, which Eqn (5) quantizes."""
    return local in _BIASES or local.startswith(_RECURRENT_BIASES)


def parameter_places(model: nn.Module) -> list[tuple[nn.Parameter, list[Place]]]:
    """Return every parameter of the float model once, with all of its places, first one first."""
    places: dict[int, tuple[nn.Parameter, list[Place]]] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        if _belongs_to_quantizer(module):
            continue
        for local, parameter in _own_parameters(module):
            place = Place(layer, module, local)
            places.setdefault(id(parameter), (parameter, []))[1].append(place)
    return list(places.values())


def shared_names(model: nn.Module) -> dict[str, str]:
    """Map every further name of a shared tensor in the float state dict to its first one."""
    first = {id(parameter): places[0].name for parameter, places in parameter_places(model)}
    aliases = {}
    for name, value in float_state(model, keep_vars=True).items():
        if first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
    return aliases


def float_state(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the float model: its names, the trained float values, no quantizers.

    With `keep_vars`, values are the model's own tensors, as in `nn.Module.state_dict`.
    """
    float_names: dict[str, str] = {}
    quantizers: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (DDQuantizer, ActivationQuantizer)):
            quantizers.add(name)
        elif _belongs_to_quantizer(module):
            layer, _, local = name.rpartition("parametrizations.")
            float_names[f"{name}.original"] = layer + local
    state = model.state_dict(keep_vars=keep_vars)
    floats = OrderedDict(
        (float_names.get(name, name), value)
        for name, value in state.items()
        if name.rpartition(".")[0] not in quantizers
    )
    # Some models (MNASNet) insist on the versions of their modules' states.
    vars(floats)["_metadata"] = vars(state)["_metadata"]
    return floats


def kind_of(module: nn.Module) -> str:
    """Return the layer's type as reports show it: Conv2d, depthwise Conv2d, Linear, ..."""
    name = parametrize.type_before_parametrizations(module).__name__
    depthwise = (
        isinstance(module, CONVOLUTIONS)
        and module.groups > 1
        and module.groups == module.in_channels
    )
    return f"depthwise {name}" if depthwise else name


def parametrizations_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the parametrizations of a module's tensors by the tensor's name."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict):  # a model may use the name for something else
        return {}
    return {k: v for k, v in lists.items() if isinstance(v, parametrize.ParametrizationList)}


def attached_quantizer(parametrizations: parametrize.ParametrizationList) -> DDQuantizer | None:
    """Return the DDQuantizer among a tensor's parametrizations; None if they are the model's."""
    first = parametrizations[0]
    return first if isinstance(first, DDQuantizer) else None


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for local, parametrizations in parametrizations_of(module).items():
        if attached_quantizer(parametrizations):
            original = parametrizations.original
            assert isinstance(original, nn.Parameter)
            yield local, original


def _belongs_to_quantizer(module: nn.Module) -> bool:
    """True for quantizers and for the parametrization list that one of them stands in."""
    if isinstance(module, parametrize.ParametrizationList):
        return attached_quantizer(module) is not None
    return isinstance(module, (DDQuantizer, ActivationQuantizer))
