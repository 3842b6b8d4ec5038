"""Quantization settings of each layer: the recipe's general values under the matching overrides."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ddqcli.errors import UsageError
from ddqcli.quant.level_kinds import MAX_BITS_BY_KIND, LevelKind
from ddqcli.recipe.schema import Override, Recipe

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
AttentionOutput = NonDynamicallyQuantizableLinear  # the last layer inside of nn.MultiheadAttention

# Of the first layer's input (pixels have 8 bits) and the last one's, if the recipe asks for fewer.
BITS_AT_ENDS = 8

_ATTRIBUTE = "ddq_config"  # of a converted model's layers


@dataclass(frozen=True)
class LayerConfig:
    """Quantization settings of one layer.

    Layers that share a weight must agree in all fields that are compared.
    """

    levels: LevelKind
    granularity: str
    min_bits: int
    max_bits: int
    skip: bool = field(compare=False)
    act_bits: int = field(compare=False)  # of the layer's input; 0: float
    bias_bits: int | None = field(compare=False)  # None: float


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights that can be quantized in a module of this type."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    if isinstance(module, nn.RNNBase):
        suffixes = ("", "_reverse") if module.bidirectional else ("",)
        ends = [f"l{k}{suffix}" for k in range(module.num_layers) for suffix in suffixes]
        return tuple(f"weight_{kind}_{end}" for end in ends for kind in ("ih", "hh", "hr"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    quantizable = (*CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS, nn.Linear)
    return ("weight",) if isinstance(module, quantizable) else ()


def layer_configs(model: nn.Module, recipe: Recipe) -> dict[str, LayerConfig]:
    """Return the settings of every layer that can be quantized, by name.

    The first and the last layer, in the order in which the modules are defined, get inputs of
    8 bits unless an override gives them others.

    Raises UsageError for overrides that match no layer or contradict each other.
    """
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if weight_names(m)}
    with_input = [name for name, m in layers.items() if not isinstance(m, AttentionOutput)]
    ends = {*with_input[:1], *with_input[-1:]}
    configs: dict[str, LayerConfig] = {}
    matched: set[int] = set()
    for name, module in layers.items():
        matching = [n for n, o in enumerate(recipe.overrides) if _matches(o, name, module)]
        configs[name] = _config(recipe, name, [recipe.overrides[n] for n in matching], name in ends)
        matched.update(matching)
    unmatched = [o.match or o.type for n, o in enumerate(recipe.overrides) if n not in matched]
    if unmatched:
        raise UsageError(
            f"No layer that can be quantized matches the override{'s' * (len(unmatched) > 1)} "
            f"{', '.join(map(str, unmatched))}; `ddq inspect MODEL` lists the layers, "
            "and * stands for any part of a name."
        )
    return configs


def attach_config(module: nn.Module, config: LayerConfig) -> None:
    """Keep the settings on the layer, where copies of the model have them too."""
    setattr(module, _ATTRIBUTE, config)


def attached_configs(model: nn.Module) -> dict[str, LayerConfig]:
    """Return the settings that `attach_config` has left on a model's layers, by name."""
    configs = {}
    for name, module in model.named_modules(remove_duplicate=False):
        config = getattr(module, _ATTRIBUTE, None)
        if isinstance(config, LayerConfig):
            configs[name] = config
    return configs


def _matches(override: Override, name: str, module: nn.Module) -> bool:
    """True if the name of the layer or of its weight matches, and its type or a parent of it."""
    names = (name, *(f"{name}.{weight}" for weight in weight_names(module)))
    pattern = override.match
    if pattern is not None and not any(fnmatch.fnmatchcase(n, pattern) for n in names):
        return False
    return override.type is None or override.type in {cls.__name__ for cls in type(module).__mro__}


def _config(recipe: Recipe, name: str, overrides: list[Override], at_end: bool) -> LayerConfig:
    """Return the general values under these overrides, of which later ones win."""
    weights, act_bits = recipe.weights, recipe.activations.bits or 0
    overridden: dict[str, Any] = {}
    for override in overrides:
        overridden |= override.model_dump(
            exclude={"match", "type", "bits"}, exclude_unset=True, exclude_none=True
        )
        if override.bits is not None:
            overridden |= {"min_bits": override.bits, "max_bits": override.bits}
    general = {
        "skip": False,
        "levels": weights.levels,
        "granularity": weights.granularity,
        "min_bits": min(weights.min_bits, overridden.get("max_bits", weights.max_bits)),
        "max_bits": max(weights.max_bits, overridden.get("min_bits", weights.min_bits)),
        "act_bits": BITS_AT_ENDS if act_bits and at_end else act_bits,
        "bias_bits": weights.bias_bits,
    }
    values = general | overridden
    if values["min_bits"] > (most := MAX_BITS_BY_KIND[values["levels"]]):
        raise UsageError(
            f"{name} is to have at least {values['min_bits']} bits, and levels that are "
            f"{values['levels']} have at most {most}: more add none on the 8-bit grid."
        )
    config = LayerConfig(**values | {"max_bits": min(values["max_bits"], most)})
    if config.min_bits > config.max_bits:
        raise UsageError(
            f"The overrides for {name} give min_bits {config.min_bits} above "
            f"max_bits {config.max_bits}."
        )
    return config
