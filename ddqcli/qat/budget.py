"""Bytes: of quantized tensors, of what stays float, and of the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ddqcli.artifact.sizes import tensor_bytes
from ddqcli.errors import BudgetError
from ddqcli.qat.convert import BIASES_KEPT
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.quant.knapsack import BitOptions, check_feasible, minimum_cost
from ddqcli.recipe.schema import Recipe
from ddqcli.recipe.size import parse_size


@dataclass(frozen=True)
class Budget:
    """What the quantized tensors may cost, and what the file holds beside them.

    Attributes:
        limit: cost allowed for all quantized tensors together (bytes, or Eqn 6's count); None without a budget.
        beside: bytes of what stays float and of the activations' tables.
        float_bytes: bytes of the float model's tensors.
        weights: number of quantized values.
    """

    limit: int | None
    beside: int
    float_bytes: int
    weights: int
    eqn6: bool = False

    @property
    def file_limit(self) -> int | None:
        """The budget as bytes of all the file's tensors."""
        return None if self.limit is None or self.eqn6 else self.limit + self.beside


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that dense tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stored_bytes(tensor: QuantizedParameter, bits: tuple[int, ...] | int | None = None) -> int:
    """Bytes of a quantized tensor in the file: indices, levels and gates, at `bits` or at the bits in force."""
    in_force = tensor.quantizer.bits
    at = (bits,) * len(in_force) if isinstance(bits, int) else bits or in_force
    each = tensor.parameter.numel() // len(at)
    return tensor_bytes([each] * len(at), list(at))


def average_bits(converted: QuantizedModel) -> float:
    """Stored bits a quantized weight: 8 times the bytes of all quantized tensors over their number of values."""
    values = sum(t.parameter.numel() for t in converted.tensors)
    return 8 * sum(stored_bytes(t) for t in converted.tensors) / max(1, values)


def activation_bytes(bits: int) -> int:
    """Bytes of one activation quantizer's table in the file."""
    return tensor_bytes([0], [bits])


def kept_bytes(converted: QuantizedModel) -> dict[str, int]:
    """What the file holds beside the quantized tensors: bytes of each tensor that stays float and of each input's table."""
    floats = {
        f"{name} in float": nbytes([value]) for name, value in converted.float_tensors().items()
    }
    return floats | {
        f"levels of {name}'s input": activation_bytes(a.bits)
        for name, a in converted.activations.items()
    }


def make_budget(
    converted: QuantizedModel, recipe: Recipe, float_bytes: int | None = None
) -> Budget:
    """The recipe's target in bytes; raises BudgetError if it cannot be met.

    Without `float_bytes`, what they were before a forward pass, none was made yet: it may turn out that some layers are never
    called, and the levels of their inputs are not stored.
    """
    weights = sum(t.parameter.numel() for t in converted.tensors)
    kept = kept_bytes(converted)
    beside, unsure = sum(kept.values()), 0
    if float_bytes is None:
        unsure = sum(activation_bytes(a.bits) for a in converted.activations.values())
        float_bytes = beside - unsure + nbytes(t.parameter for t in converted.tensors)
    target, eqn6 = recipe.budget, recipe.budget.count == "eqn6"
    limit = None
    if target.target_bits is not None:
        limit, unsure = (
            int(weights * 2**target.target_bits if eqn6 else weights * target.target_bits / 8),
            0,
        )
    elif target.target_size is not None:
        try:
            limit = parse_size(target.target_size, float_bytes) - beside
        except ValueError as error:
            raise BudgetError(f"{error}, of a float model of {float_bytes:,} bytes.") from error
    choices = [BitOptions(t.name, costs_of(t, eqn6), {}) for t in converted.tensors]
    if limit is not None and minimum_cost(choices) > limit + unsure:
        check_feasible(
            choices,
            limit,
            kept if target.target_size else None,
            unit="by Eqn (6)'s count" if eqn6 else "bytes",
            remedies=_remedies(converted, recipe),
        )
    return Budget(limit, beside, float_bytes, weights, eqn6)


def _remedies(converted: QuantizedModel, recipe: Recipe) -> list[str]:
    """What makes a smaller file possible in this recipe."""
    weights = [t for t in converted.tensors if t.kind != "bias"]
    biases = [t for t in converted.tensors if t.kind == "bias"]
    least, bias_bits = recipe.weights.min_bits, recipe.weights.bias_bits
    sized, by_eqn6 = recipe.budget.target_size is not None, recipe.budget.count == "eqn6"
    fewer = [sum(stored_bytes(t, s) for t in biases) for s in range(1, bias_bits or 1)]
    found = {
        "lower --min-bits": least > 1 and any(t.min_bits == least for t in weights),
        "lift bits and min_bits from the overrides": any(
            (o.bits or o.min_bits or 0) > least for o in recipe.overrides
        ),
        "lift skip from the overrides": sized and any(o.skip for o in recipe.overrides),
        "set weights.granularity=layer": not by_eqn6 and recipe.weights.granularity == "channel",
        "set weights.bias_bits=8": sized and BIASES_KEPT in converted.kept.values(),
        "lower weights.bias_bits": any(cost < sum(map(stored_bytes, biases)) for cost in fewer),
    }
    return [remedy for remedy, helps in found.items() if helps]


def cost_of(tensor: QuantizedParameter, bits: tuple[int, ...], eqn6: bool) -> int:
    """Cost at these bits of the groups: stored bytes, or N * 2^s (Eqn 6)."""
    return (
        sum(tensor.parameter.numel() // len(bits) * 2**s for s in bits)
        if eqn6
        else stored_bytes(tensor, bits)
    )


def costs_of(tensor: QuantizedParameter, eqn6: bool) -> dict[int, int]:
    """Cost at every bit-width on offer; none is where more bits cost less, as the levels of a small tensor can outweigh it."""
    groups = len(tensor.quantizer.bits)
    costs = {
        s: cost_of(tensor, (s,) * groups, eqn6) for s in range(tensor.min_bits, tensor.max_bits + 1)
    }
    return {
        s: cost
        for s, cost in costs.items()
        if all(cost < costs[more] for more in range(s + 1, max(costs) + 1))
    }
