"""The budget in bytes: what quantized tensors may cost, and what stays float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddqcli.artifact.manifest import (
    activation_leaf,
    alias_leaf,
    constant_leaf,
    description_bytes,
    float_leaf,
    quantized_leaf,
)
from ddqcli.artifact.sizes import tensor_bytes
from ddqcli.errors import BudgetError
from ddqcli.qat.frozen import INPUT, tensor_to_array
from ddqcli.qat.kept_float import BIASES_KEPT
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.quant.knapsack import BitOptions, check_feasible, minimum_cost
from ddqcli.recipe.schema import Recipe
from ddqcli.recipe.size import parse_size

DESCRIPTION = "names, shapes and the report"  # as refusals call header and manifest
IN_ONNX = "nodes and floats of the ONNX file, at most"


@dataclass(frozen=True)
class ResolvedBudget:
    """The recipe's budget in numbers, for one model.

    Attributes:
        limit: cost allowed for all quantized tensors together; None without a budget.
        overhead_bytes: what the file holds beside them: floats and tables of input levels.
        description_bytes: the most that header and manifest of the file take, with `meta`.
        float_bytes: bytes of the float model's tensors.
        weights: number of quantized values.
        eqn6: costs are counted as in Eqn (6), the sum of N * 2^s, and not in bytes.
        meta: what the manifest says about the model.
        reserve: bytes of a target for another format that quantized tensors cannot have; None for
            the safetensors file.
    """

    limit: int | None
    overhead_bytes: int
    float_bytes: int
    weights: int
    eqn6: bool = False
    description_bytes: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    reserve: int | None = None

    @property
    def file_limit(self) -> int | None:
        """The budget in bytes of the whole file."""
        if self.limit is None or self.eqn6:
            return None
        return self.limit + self.overhead_bytes + self.description_bytes


def make_budget(
    model: QuantizedModel,
    recipe: Recipe,
    float_bytes: int | None = None,
    meta: Mapping[str, Any] | None = None,
    reserve: int | None = None,
) -> ResolvedBudget:
    """Return the recipe's budget for a model. Raises BudgetError if it cannot be met.

    Without `float_bytes` (the float model's bytes before any forward pass) no forward pass was made
    yet. Layers may then turn out to be never called, so the levels of their inputs not stored.
    `meta` is what the file's manifest will say about the model, or something as long. `reserve` is
    as in ResolvedBudget.
    """
    overhead = kept_bytes(model)
    overhead_bytes, uncertain = sum(overhead.values()), 0
    if float_bytes is None:
        uncertain = sum(activation_bytes(a.bits) for a in model.activations.values())
        quantized = nbytes(t.parameter for t in model.tensors)
        float_bytes = nbytes(model.float_tensors().values()) + quantized
    weights = sum(t.parameter.numel() for t in model.tensors)
    meta = meta or {}
    described = _description_bytes(model, meta)
    target, eqn6 = recipe.budget, recipe.budget.count == "eqn6"
    limit, in_words = None, ""
    in_unit: Callable[[int], str] = "{:,} bytes".format
    if target.target_bits is not None:
        in_unit = partial(_in_bits, weights=weights, eqn6=eqn6)
        limit = int(weights * (2**target.target_bits if eqn6 else target.target_bits / 8))
        overhead, uncertain = {}, 0  # not counted
        _check_usable(model, recipe, target.target_bits, limit)
        in_words = f"{target.target_bits:g} bits a weight ({_cost_text(limit, eqn6)})"
    elif target.target_size is not None:
        try:
            size = parse_size(target.target_size, float_bytes)
            limit = size - overhead_bytes - described
            overhead[DESCRIPTION] = described
            if reserve is not None:
                limit, overhead, uncertain = size - reserve, {IN_ONNX: reserve}, 0
            in_words = f"{target.target_size} ({size:,} bytes of the whole file)"
        except ValueError as error:
            raise BudgetError(f"{error}, of a float model of {float_bytes:,} bytes.") from error
    options = [BitOptions(t.name, costs_of(t, eqn6), {}) for t in model.tensors]
    if limit is not None and minimum_cost(options) > limit + uncertain:
        check_feasible(
            options,
            limit,
            overhead,
            target=in_words,
            in_unit=in_unit,
            remedies=_remedies(model, recipe),
        )
    return ResolvedBudget(
        limit, overhead_bytes, float_bytes, weights, eqn6, described, meta, reserve
    )


def _in_bits(cost: int, *, weights: int, eqn6: bool) -> str:
    """Return a cost as bits a weight, rounded up, so that this target can be met, and as it is."""
    bits = math.log2(cost / weights) if eqn6 else 8 * cost / weights
    return f"{math.ceil(1000 * bits) / 1000:g} bits a weight ({_cost_text(cost, eqn6)})"


def _cost_text(cost: int, eqn6: bool) -> str:
    return f"{cost:,} by Eqn (6)'s count" if eqn6 else f"{cost:,} bytes"


def _description_bytes(model: QuantizedModel, meta: Mapping[str, Any]) -> int:
    """Return the most that header and manifest of the model's file take."""
    leaves = {name: alias_leaf(target) for name, target in model.aliases.items()}
    leaves |= {name + INPUT: activation_leaf() for name in model.activations}
    for t in model.tensors:
        groups = len(t.quantizer.bits)
        leaves[t.name] = quantized_leaf(t.shape, t.quantizer.axis if groups > 1 else None)
    constants = model.folded_norms().constants
    for name, value in model.float_tensors().items():
        if name in constants:
            leaves[name] = constant_leaf(name, tensor_to_array(constants[name].cpu()))
        else:
            dtype = tensor_to_array(torch.empty(0, dtype=value.dtype)).dtype
            leaves[name] = float_leaf(name, dtype, tuple(value.shape))
    inputs = sum(activation_bytes(a.bits) for a in model.activations.values())
    most = inputs + sum(stored_bytes(t, 8) + 128 * len(t.quantizer.bits) for t in model.tensors)
    return description_bytes(leaves, most, meta)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of dense tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stored_bytes(tensor: QuantizedParameter, bits: tuple[int, ...] | int | None = None) -> int:
    """Return the bytes of a quantized tensor in the file: indices, levels and gates.

    `bits`: the bit-width of all groups or of each; by default, those in force.
    """
    in_force = tensor.quantizer.bits
    by_group = (bits,) * len(in_force) if isinstance(bits, int) else bits or in_force
    group_size = tensor.parameter.numel() // len(by_group)
    return tensor_bytes([group_size] * len(by_group), list(by_group))


def average_bits(model: QuantizedModel) -> float:
    """Return the stored bits per quantized value: 8 times the tensors' bytes over their values."""
    values = sum(t.parameter.numel() for t in model.tensors)
    return 8 * sum(stored_bytes(t) for t in model.tensors) / max(1, values)


def activation_bytes(bits: int) -> int:
    """Return the bytes of one input quantizer's levels in the file."""
    return tensor_bytes([0], [bits])


def kept_bytes(model: QuantizedModel) -> dict[str, int]:
    """Return the overhead by what causes it: each float tensor and each input's levels."""
    constants = model.folded_norms().constants
    floats = {
        f"{name} in float": nbytes([value])
        for name, value in model.float_tensors().items()
        if name not in constants
    }
    return floats | {
        f"levels of {name}'s input": activation_bytes(a.bits)
        for name, a in model.activations.items()
    }


def cost_of(tensor: QuantizedParameter, bits: tuple[int, ...], eqn6: bool) -> int:
    """Return the cost at these bits of the groups: stored bytes, or N * 2^s (Eqn 6)."""
    if eqn6:
        return sum(tensor.parameter.numel() // len(bits) * 2**s for s in bits)
    return stored_bytes(tensor, bits)


def costs_of(tensor: QuantizedParameter, eqn6: bool) -> dict[int, int]:
    """Return the cost of every bit-width on offer.

    Omits a bit-width if a larger one costs no more (the level table of a small tensor can outweigh
    its indices).
    """
    groups = len(tensor.quantizer.bits)
    costs = {s: cost_of(tensor, (s,) * groups, eqn6) for s in tensor.offered}
    return {
        s: cost
        for s, cost in costs.items()
        if all(cost < costs[more] for more in costs if more > s)
    }


def _check_usable(model: QuantizedModel, recipe: Recipe, target_bits: float, limit: int) -> None:
    """Raise BudgetError for more bits than weights may have, unless their tables need the rest."""
    eqn6 = recipe.budget.count == "eqn6"
    max_bits = max((t.max_bits for t in model.tensors if t.kind != "bias"), default=0)
    most = sum(costs_of(t, eqn6)[t.max_bits] for t in model.tensors)
    if target_bits > max_bits and limit > most:
        remedy = ", or raise --max-bits" if recipe.weights.max_bits < 8 else ""
        raise BudgetError(
            f"The budget of {target_bits:g} bits a weight can never be used: no weight may take "
            f"more than {max_bits} (by --max-bits, levels and overrides); lower the target{remedy}."
        )


def _remedies(model: QuantizedModel, recipe: Recipe) -> list[str]:
    """Return the changes of this recipe that would make a smaller file possible."""
    weights = [t for t in model.tensors if t.kind != "bias"]
    biases = [t for t in model.tensors if t.kind == "bias"]
    min_bits, bias_bits = recipe.weights.min_bits, recipe.weights.bias_bits
    by_size, by_eqn6 = recipe.budget.target_size is not None, recipe.budget.count == "eqn6"
    bias_bytes = sum(map(stored_bytes, biases))
    fewer_bits = [sum(stored_bytes(t, s) for t in biases) for s in range(1, bias_bits or 1)]
    remedies = {
        "lower --min-bits": min_bits > 1 and any(t.min_bits == min_bits for t in weights),
        "lift bits and min_bits from the overrides": any(
            (o.bits or o.min_bits or 0) > min_bits for o in recipe.overrides
        ),
        "lift skip from the overrides": by_size and any(o.skip for o in recipe.overrides),
        "set weights.granularity=layer": not by_eqn6 and recipe.weights.granularity == "channel",
        "set weights.bias_bits=8": by_size and BIASES_KEPT in model.kept_float.values(),
        "lower weights.bias_bits": any(cost < bias_bytes for cost in fewer_bits),
    }
    return [remedy for remedy, helps in remedies.items() if helps]
