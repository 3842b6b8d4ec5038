"""What the recipe says of each layer that can be quantized: its general values, and the overrides that match over them."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutput

from ddqcli.errors import UsageError
from ddqcli.quant.level_kinds import MAX_BITS_BY_KIND, LevelKind
from ddqcli.recipe.schema import Override, Recipe

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
BITS_AT_ENDS = 8  # of the first layer's input (pixels have 8 bits) and the last one's, where the recipe asks for fewer


@dataclass(frozen=True)
class LayerConfig:
    """What one layer is to be. Layers that share a weight must agree, but for the fields that are not compared."""

    levels: LevelKind
    granularity: str
    min_bits: int
    max_bits: int
    skip: bool = field(compare=False)
    act_bits: int = field(compare=False)  # of the layer's input; 0: float


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights that can be quantized in a module of this type."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return (
        ("weight",)
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS, nn.Linear))
        else ()
    )


def layer_configs(model: nn.Module, recipe: Recipe) -> dict[str, LayerConfig]:
    """The plan of every layer that can be quantized, by name.

    The first and the last layer, in the order in which the modules are defined, get inputs of 8 bits unless an override
    says otherwise. Raises UsageError for overrides that match no layer or contradict each other.
    """
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if weight_names(m)}
    with_input = [name for name, m in layers.items() if not isinstance(m, AttentionOutput)]
    ends = {*with_input[:1], *with_input[-1:]}
    plans, matched = {}, set()
    for name, module in layers.items():
        applying = [
            n for n, override in enumerate(recipe.overrides) if _applies(override, name, module)
        ]
        plans[name] = _plan(recipe, name, [recipe.overrides[n] for n in applying], name in ends)
        matched.update(applying)
    stray = [o.match or o.type for n, o in enumerate(recipe.overrides) if n not in matched]
    if stray:
        raise UsageError(
            f"No layer that can be quantized matches the override{'s' * (len(stray) > 1)} {', '.join(map(str, stray))}; "
            "`ddq inspect MODEL` lists the layers, and * stands for any part of a name."
        )
    return plans


def _applies(override: Override, name: str, module: nn.Module) -> bool:
    """Whether an override is for this layer: by the layer's name or its weight's, and by its type or a parent of it."""
    names = (name, *(f"{name}.{weight}" for weight in weight_names(module)))
    if override.match is not None and not any(
        fnmatch.fnmatchcase(n, override.match) for n in names
    ):
        return False
    return override.type is None or override.type in {cls.__name__ for cls in type(module).__mro__}


def _plan(recipe: Recipe, name: str, overrides: list[Override], at_end: bool) -> LayerConfig:
    """The recipe's general values under these overrides, the later ones over the earlier ones."""
    weights, act_bits = recipe.weights, recipe.activations.bits or 0
    given: dict[str, Any] = {}
    for override in overrides:
        given |= override.model_dump(
            exclude={"match", "type", "bits"}, exclude_unset=True, exclude_none=True
        )
        if override.bits is not None:
            given |= {"min_bits": override.bits, "max_bits": override.bits}
    general = {
        "skip": False,
        "levels": weights.levels,
        "granularity": weights.granularity,
        "min_bits": min(weights.min_bits, given.get("max_bits", weights.max_bits)),
        "max_bits": max(weights.max_bits, given.get("min_bits", weights.min_bits)),
        "act_bits": BITS_AT_ENDS if act_bits and at_end else act_bits,
    }
    values = general | given
    if values["min_bits"] > (most := MAX_BITS_BY_KIND[values["levels"]]):
        raise UsageError(
            f"{name} is to have at least {values['min_bits']} bits, and levels that are {values['levels']} have at most {most}: "
            "more add none on the 8-bit grid."
        )
    plan = LayerConfig(**values | {"max_bits": min(values["max_bits"], most)})
    if plan.min_bits > plan.max_bits:
        raise UsageError(
            f"The overrides for {name} give min_bits {plan.min_bits} above max_bits {plan.max_bits}."
        )
    return plan
