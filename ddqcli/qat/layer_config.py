"""Quantization settings of each layer: the recipe's general values under the matching overrides."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass, field, replace
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
    offered: tuple[int, ...] = ()  # bit-widths from min_bits to max_bits, which are among them
    # Parameters that an override names as weights, with their kinds.
    named: tuple[tuple[str, str], ...] = field(default=(), compare=False)


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
    modules = dict(model.named_modules(remove_duplicate=False))
    named = {name: kinds for name, m in modules.items() if (kinds := _named(recipe, name, m))}
    layers = {name: m for name, m in modules.items() if weight_names(m) or name in named}
    with_input = [
        name for name, m in layers.items() if weight_names(m) and not isinstance(m, AttentionOutput)
    ]
    ends = {*with_input[:1], *with_input[-1:]}
    configs: dict[str, LayerConfig] = {}
    matched: set[int] = set()
    for name, module in layers.items():
        kinds = named.get(name, {})
        matching = [n for n, o in enumerate(recipe.overrides) if _matches(o, name, module, kinds)]
        _check_named(recipe, name, matching)
        config = _config(recipe, name, [recipe.overrides[n] for n in matching], name in ends)
        # What such a parameter is multiplied by is not its module's input.
        act_bits = config.act_bits if weight_names(module) else 0
        configs[name] = replace(config, named=tuple(kinds.items()), act_bits=act_bits)
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


def _named(recipe: Recipe, name: str, module: nn.Module) -> dict[str, str]:
    """Return the kinds of a module's parameters that overrides name as weights."""
    prefix = f"{name}." if name else ""
    return {
        local: override.kind
        for override in recipe.overrides
        for local, _ in module.named_parameters(recurse=False)
        if override.kind is not None
        and fnmatch.fnmatchcase(prefix + local, override.match or "")
        and local not in weight_names(module)
    }


def _check_named(recipe: Recipe, name: str, matching: Collection[int]) -> None:
    """Raise UsageError if overrides give named parameters of one module different settings."""
    named = [recipe.overrides[n] for n in matching if recipe.overrides[n].kind is not None]
    settings = [override.model_dump(exclude={"match", "type", "kind"}) for override in named]
    if any(other != settings[0] for other in settings[1:]):
        raise UsageError(
            f"{' and '.join(str(override.match) for override in named)} are parameters of one "
            f"module, {name or 'the network'}; give them the same settings."
        )


def _matches(override: Override, name: str, module: nn.Module, named: Collection[str]) -> bool:
    """True if the name of the layer or of its weight matches, and its type or a parent of it."""
    prefix = f"{name}." if name else ""
    names = (name, *(prefix + weight for weight in (*weight_names(module), *named)))
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
            exclude={"match", "type", "kind", "bits"}, exclude_unset=True, exclude_none=True
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
    offered = tuple(
        s for s in sorted(set(weights.bits_offered)) if config.min_bits <= s <= config.max_bits
    )
    if config.skip:
        return config
    if not offered:
        raise UsageError(
            f"{name} may have {config.min_bits} to {config.max_bits} bits, and "
            f"weights.bits_offered has none of these: {weights.bits_offered}."
        )
    return replace(config, min_bits=offered[0], max_bits=offered[-1], offered=offered)
