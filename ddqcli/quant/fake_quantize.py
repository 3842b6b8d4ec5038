"""DDQ's quantization function (Eqn 3) and its gradients (Eqns 8 and 9, and those of the gates).

Ours, where Eqn (8) is incomplete: it moves a level's members along with the level, but not the
values that change sides as the thresholds move. Where values lie densely, these undo the movement
on average: x_q stays near x, which is what the straight-through gradient of x assumes, and levels
that follow Eqn (8) alone drift. So a level gets the gradient of x_q minus that of the straight line
between the two levels around x. Where both levels move alike nothing changes, and a value on a
level moves nothing. Evenly spaced levels give the step size LSQ's gradient (Esser et al. 2020,
Eqn 3).

No level stands for NaN or infinity. These become NaN, so the loss shows them without asking the
device at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddqcli.quant import kernels
from ddqcli.quant.device_constants import device_constant
from ddqcli.quant.lookup import LookupTables


def fake_quantize(
    x: Tensor,
    tables: LookupTables,
    *,
    axis: int = 0,
    correction: float = 0.0,
    use_compiled: bool = False,
) -> Tensor:
    """Replace each value by the nearest level in force (Eqn 3), exactly a member of the level set.

    A tie goes to the upper level; NaN and infinities become NaN. Only x is saved for the backward
    pass, which a float layer saves as well.

    Args:
        x: values, any shape and floating dtype.
        tables: of 1 group, or of x.shape[axis] groups.
        axis: axis of x along which the groups lie.
        correction: lambda of Eqn (9), in units of the loss per squared unit of x.
        use_compiled: use the kernels in C if x is on a CPU.

    Gradients:
        x: straight through between the outer levels, 0 beyond (Sec. 3.2).
        levels: of x_q minus the straight line between the two levels around x, or of x_q where x is
            beyond the outer ones, plus Eqn (9); divided by the run length (Eqn 8's 1 / Z_U).
        gates: for gates s and s + 1 the finite differences A_s - A_(s-1) and A_(s+1) - A_s, plus
            Eqn (9), where A_s are the levels at s bits; 0 for the others.

    >>> from ddqcli.quant.lookup import make_lookup_tables
    >>> levels = torch.tensor([[0.0, 10.0, 20.0, 30.0]], requires_grad=True)
    >>> scale, zero_point, gates = torch.ones(1), torch.zeros(1), torch.ones(1, 2)
    >>> x = torch.tensor([4.0, 5.0, 99.0], requires_grad=True)
    >>> x_q = fake_quantize(x, make_lookup_tables(levels, scale, zero_point, gates, (2,)))
    >>> x_q
    tensor([ 0., 10., 30.], grad_fn=<_LevelGradientsBackward>)
    >>> x_q.sum().backward()
    >>> x.grad  # 99 lies beyond the outer level
    tensor([1., 1., 0.])
    >>> levels.grad  # 0.4 * (level 0 - level 1) for 4, 0.5 * (level 1 - level 0) for 5, 1 for 99
    tensor([[-0.1000,  0.1000,  0.0000,  1.0000]])

    At 1 bit, the levels in force are the means of pairs:

    >>> tables = make_lookup_tables(levels.detach(), scale, zero_point, gates, (1,))
    >>> fake_quantize(x.detach(), tables)
    tensor([ 5.,  5., 25.])
    """
    factor = tables.values.new_full((1,), correction) if correction else None
    return _apply([x], tables, factor, axis, use_compiled)[0]


def fake_quantize_many(
    xs: list[Tensor],
    tables: LookupTables,
    corrections: list[float],
    *,
    use_compiled: bool = False,
) -> tuple[Tensor, ...]:
    """`fake_quantize` of several small tensors of one group each, for about the cost of one.

    Args:
        xs: G tensors of any shapes.
        tables: of G groups.
        corrections: lambda of Eqn (9) for each tensor.
        use_compiled: use the kernels in C if they are on a CPU.
    """
    device = tables.values.device
    factors = None
    if any(corrections):
        factors = device_constant(tuple(corrections), device, torch.float32)
    return _apply(xs, tables, factors, 0, use_compiled)


def _apply(
    xs: list[Tensor],
    tables: LookupTables,
    correction: Tensor | None,
    axis: int,
    use_compiled: bool,
) -> tuple[Tensor, ...]:
    """Quantize, with the backward pass that fits what is learned."""
    learned = tables.learned and tables.values.requires_grad
    path: type[_FakeQuantize] = _LevelGradients if learned else _StraightThrough
    constants = kernels.Constants(tables.cells, correction, axis, use_compiled)
    out: tuple[Tensor, ...] = path.apply(tables.values, tables.values_for_gates, constants, *xs)
    return out


class _FakeQuantize(torch.autograd.Function):
    """(values, values_for_gates, constants, *xs) -> for each x the nearest of `values` [G, n].

    Takes one x of G groups, or G tensors of one group each. Subclasses add the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        values_for_gates: Tensor,
        constants: kernels.Constants,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, *xs)
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        return kernels.quantize(values, constants, xs)


class _StraightThrough(_FakeQuantize):
    """Nothing behind the levels is learned: the gradient of x alone."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, *xs = ctx.saved_tensors
        grad_xs = kernels.straight_through(values, ctx.constants, grads, xs)
        grad_values = torch.zeros_like(values) if ctx.needs_input_grad[0] else None
        return grad_values, None, None, *_used(grad_xs, grads)


class _LevelGradients(_FakeQuantize):
    """Levels are learned, and gates if their values need a gradient."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, *xs = ctx.saved_tensors
        learned_gates = ctx.needs_input_grad[1]
        gradients = kernels.gradients(values, ctx.constants, grads, xs, learned_gates)
        of_levels = gradients.values, gradients.values_for_gates
        return *of_levels, None, *_used(gradients.xs, grads)


def _used(grad_xs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Without the gradient of an x whose result was not used, so that optimizers skip it."""
    pairs = zip(grad_xs, grads, strict=True)
    return [None if grad is None else grad_x for grad_x, grad in pairs]
