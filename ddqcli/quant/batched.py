"""Lookup tables and small quantized weights of a whole model, computed together once a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ddqcli.quant.fake_quantize import MANY, fake_quantize_many
from ddqcli.quant.lookup import LookupTables, make_lookup_tables
from ddqcli.quant.quantizer import DDQuantizer


@contextmanager
def batched(
    weights: Iterable[tuple[DDQuantizer, Tensor]], others: Iterable[DDQuantizer] = ()
) -> Iterator[None]:
    """Within: what a step's quantizers have to compute is there, made with few calls for all of them together.

    All quantizers with one group of learned levels have their tables, and what becomes of small weights is known. Nothing that is
    learned may change within.
    """
    small: dict[int, list[tuple[DDQuantizer, Tensor]]] = {}
    alike: dict[tuple[int, ...], list[DDQuantizer]] = {}
    pairs = [*weights, *((quantizer, None) for quantizer in others)]
    for quantizer, weight in pairs:
        if quantizer.kind != "learned" or len(quantizer.bits) > 1:
            continue
        if weight is not None and weight.numel() < MANY:
            small.setdefault(quantizer.max_bits, []).append((quantizer, weight))
        else:
            alike.setdefault((quantizer.max_bits, *quantizer.bits), []).append(quantizer)
    try:
        for members in alike.values():
            for quantizer, tables in zip(members, _tables_of(members).split(), strict=True):
                quantizer.tables = tables
        for together in small.values():
            owners, tensors = zip(*together, strict=True)
            corrections = [quantizer.correction for quantizer in owners]
            found = fake_quantize_many(list(tensors), _tables_of(owners), corrections)
            for quantizer, *done in zip(owners, tensors, found, strict=True):
                quantizer.done = tuple(done)
        yield
    finally:
        for quantizer, _ in pairs:
            quantizer.tables = quantizer.done = None


def _tables_of(quantizers: Sequence[DDQuantizer]) -> LookupTables:
    """Tables of several quantizers of one group each, as groups."""
    parts = zip(*((*q.grid(), q.gate_logits) for q in quantizers), strict=True)
    levels, scale, zero_point, gates = (torch.cat(part) for part in parts)
    return make_lookup_tables(
        levels, scale, zero_point, gates, tuple(q.bits[0] for q in quantizers)
    )
