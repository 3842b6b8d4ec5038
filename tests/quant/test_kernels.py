"""The choice of the backward pass."""

from __future__ import annotations

import pytest
import torch
from quant_cases import normal

from ddqcli.quant import fake_quantize
from ddqcli.quant.lookup import make_lookup_tables


@pytest.mark.parametrize(
    ("trained", "path"),
    [
        ((), "_StraightThrough"),
        (("levels",), "_LevelGradients"),
        (("levels", "gates"), "_LevelGradients"),
    ],
)
def test_the_backward_pass_follows_from_what_is_trained(trained, path):
    inputs = {"levels": torch.rand(1, 4) * 255, "gates": torch.ones(1, 2)}
    for name in trained:
        inputs[name].requires_grad_()
    tables = make_lookup_tables(
        inputs["levels"], torch.ones(1), torch.zeros(1), inputs["gates"], (2,)
    )
    out = fake_quantize.fake_quantize(normal(50).requires_grad_(), tables)
    assert type(out.grad_fn).__name__ == f"{path}Backward"
