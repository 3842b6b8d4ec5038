"""Squared error by bit-width against fitted quantizers."""

from __future__ import annotations

import pytest
from quant_cases import normal, squared_error

from ddqcli.quant.error_curve import squared_error_by_bits
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.level_kinds import MAX_BITS_BY_KIND
from ddqcli.quant.quantizer import DDQuantizer


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
def test_the_error_curve_gives_the_error_after_a_fit(kind, sparse):
    x = normal(20_000)
    if sparse:
        x[2000:] = 0
    curve = squared_error_by_bits(
        Histogram.of(x.numpy()), range(1, MAX_BITS_BY_KIND[kind] + 1), kind
    )
    for s in curve:
        quantizer = DDQuantizer.from_tensor(x, s, kind=kind)
        assert curve[s] == pytest.approx(squared_error(quantizer, x), rel=0.05)
