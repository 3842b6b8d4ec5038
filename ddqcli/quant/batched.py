"""Tables, step sizes and small quantized weights of a model, precomputed once per step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddqcli.quant.activation import ActivationQuantizer, step_sizes
from ddqcli.quant.fake_quantize import fake_quantize_many
from ddqcli.quant.lookup import LookupTables, make_lookup_tables
from ddqcli.quant.quantizer import DDQuantizer

_SMALL = 2**16  # values of a tensor, up to which a copy costs less than calls of its own


@contextmanager
def batched(
    weights: Iterable[tuple[DDQuantizer, Tensor]], inputs: Iterable[ActivationQuantizer] = ()
) -> Iterator[None]:
    """Precompute lookup tables, step sizes and small quantized weights for one training step.

    This takes a few calls for all tensors together. It covers quantizers with one group of learned
    levels; the others compute their own as usual. Nothing learned may change inside the context.

    A step size that the step does not use gets no gradient, as on its own, so optimizers skip it.
    Levels and gates that it does not use may get a gradient of zeros.

    Args:
        weights: quantizers with the tensors that they quantize.
        inputs: quantizers of activations, which are not known yet.
    """
    small: dict[int, list[tuple[DDQuantizer, Tensor]]] = defaultdict(list)  # by maximum bits
    alike: dict[tuple[int, int], list[DDQuantizer]] = defaultdict(list)  # and bits in force
    inputs = list(inputs)
    pairs = [*weights, *((each.learned, None) for each in inputs if each.learned is not None)]
    for quantizer, weight in pairs:
        if quantizer.kind != "learned" or len(quantizer.bits) > 1:
            continue
        if weight is not None and weight.numel() < _SMALL:
            small[quantizer.max_bits].append((quantizer, weight))
        else:
            alike[quantizer.max_bits, quantizer.bits[0]].append(quantizer)
    try:
        for quantizers in alike.values():
            _precompute_tables(quantizers)
        for tensors in small.values():
            _precompute_outputs(tensors)
        _precompute_steps([each for each in inputs if each.learned is None])
        yield
    finally:
        for quantizer, _ in pairs:
            quantizer.precomputed_tables = quantizer.precomputed_output = None
        for each in inputs:
            each.precomputed_scale = None


def _precompute_tables(quantizers: Sequence[DDQuantizer]) -> None:
    for quantizer, tables in zip(quantizers, _joint_tables(quantizers).split(), strict=True):
        quantizer.precomputed_tables = tables


def _precompute_outputs(tensors: Sequence[tuple[DDQuantizer, Tensor]]) -> None:
    quantizers, xs = [q for q, _ in tensors], [x for _, x in tensors]
    corrections = [q.correction for q in quantizers]
    use_compiled = all(q.use_compiled for q in quantizers)
    tables = _joint_tables(quantizers)
    outputs = fake_quantize_many(xs, tables, corrections, use_compiled=use_compiled)
    for quantizer, x, output in zip(quantizers, xs, outputs, strict=True):
        quantizer.precomputed_output = x, output


def _precompute_steps(inputs: Sequence[ActivationQuantizer]) -> None:
    if inputs:
        scales = _StepSizes.apply(*(each.log2_scale for each in inputs))
        for each, scale in zip(inputs, scales, strict=True):
            each.precomputed_scale = scale


class _StepSizes(torch.autograd.Function):
    """(*log2_scales) -> for each its step size; one that is not used gets no gradient."""

    @staticmethod
    def forward(ctx: Any, *log2_scales: Tensor) -> tuple[Tensor, ...]:
        scales = torch.stack(log2_scales)
        ctx.save_for_backward(scales)
        ctx.set_materialize_grads(False)
        return step_sizes(scales).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (scales,) = ctx.saved_tensors
        zero = scales.new_zeros(())
        factors = torch.exp2(scales) * math.log(2)
        joined = torch.stack([zero if grad is None else grad for grad in grads]) * factors
        pairs = zip(grads, joined.unbind(), strict=True)
        return tuple(None if grad is None else product for grad, product in pairs)


def _joint_tables(quantizers: Sequence[DDQuantizer]) -> LookupTables:
    """Tables of quantizers of one group each, as the groups of one table."""
    parts = zip(*((*q.grid(), q.gates()) for q in quantizers), strict=True)
    levels, scale, zero_point, gates = (torch.cat(part) for part in parts)
    bits = tuple(q.bits[0] for q in quantizers)
    return make_lookup_tables(levels, scale, zero_point, gates, bits)
