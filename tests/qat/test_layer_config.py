"""Settings of each layer: overrides, and the bits of the inputs."""

from __future__ import annotations

from typing import Any

import pytest
from small_models import bits_of, recipe, small
from torch import nn

from ddqcli.errors import UsageError
from ddqcli.qat.convert import convert


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param([], {"0": (2, 6), "1": (2, 6), "3": (2, 6), "4": (2, 6)}, id="none"),
        pytest.param(
            [{"match": "3", "bits": 4}],
            {"0": (2, 6), "1": (2, 6), "3": (4, 4), "4": (2, 6)},
            id="name",
        ),
        pytest.param(
            [{"match": "3.weight", "bits": 4}],
            {"0": (2, 6), "1": (2, 6), "3": (4, 4), "4": (2, 6)},
            id="weight",
        ),
        pytest.param(
            [{"match": "[01]", "max_bits": 5}],
            {"0": (2, 5), "1": (2, 5), "3": (2, 6), "4": (2, 6)},
            id="pattern",
        ),
        pytest.param(
            [{"type": "Linear", "min_bits": 3}],
            {"0": (2, 6), "1": (2, 6), "3": (3, 6), "4": (3, 6)},
            id="type",
        ),
        pytest.param(
            [{"match": "4", "type": "Conv2d"}, {"match": "0", "skip": True}], None, id="both, stray"
        ),
        pytest.param(
            [{"match": "?", "max_bits": 1}],
            {n: (1, 1) for n in "0134"},
            id="maximum below the general minimum",
        ),
        pytest.param(
            [{"match": "?", "min_bits": 7}],
            {n: (7, 7) for n in "0134"},
            id="minimum above the general maximum",
        ),
        pytest.param(
            [{"match": "0", "skip": True}], {"1": (2, 6), "3": (2, 6), "4": (2, 6)}, id="skip"
        ),
        pytest.param(
            [{"match": "0", "skip": True}, {"match": "*", "bits": 3}],
            {n: (3, 3) for n in "134"},
            id="a later one adds",
        ),
        pytest.param(
            [{"match": "*", "skip": True}, {"match": "3", "skip": False}],
            {"3": (2, 6)},
            id="a later one wins",
        ),
        pytest.param(
            [{"match": "*", "bits": 3}, {"match": "4", "max_bits": 8}],
            {"0": (3, 3), "1": (3, 3), "3": (3, 3), "4": (3, 8)},
            id="field by field",
        ),
    ],
)
def test_overrides(
    overrides: list[dict[str, Any]], expected: dict[str, tuple[int, int]] | None
) -> None:
    settings = recipe(*overrides, min_bits=2, max_bits=6)
    if expected is None:
        with pytest.raises(
            UsageError, match="No layer that can be quantized matches the override 4;"
        ):
            convert(small(), settings)
        return
    quantized = convert(small(), settings)
    assert bits_of(quantized) == expected
    assert all(
        t.quantizer.max_bits == t.max_bits and t.fixed == (t.min_bits == t.max_bits)
        for t in quantized.tensors
    )
    skipped = set("0134") - set(expected)
    assert {
        name for name, reason in quantized.kept_float.items() if reason == "an override says skip"
    } == {f"{layer}.{part}" for layer in skipped for part in ("weight", "bias")}


def test_overrides_of_levels_granularity_and_inputs() -> None:
    settings = recipe(
        {"match": "0", "levels": "uniform"},
        {"match": "1", "granularity": "channel"},
        {"match": "3", "act_bits": 0},
        {"match": "1", "act_bits": 3},
        max_bits=4,
        act_bits=5,
    )
    quantized = convert(small(), settings)
    found = {t.name: t.quantizer for t in quantized.tensors}
    assert [found[f"{n}.weight"].kind for n in "0134"] == [
        "uniform",
        "learned",
        "learned",
        "learned",
    ]
    assert [len(found[f"{n}.weight"].bits) for n in "0134"] == [1, 4, 1, 1]
    assert {name: a.bits for name, a in quantized.activations.items()} == {"0": 8, "1": 3, "4": 8}


def test_powers_of_two_have_the_bits_that_their_levels_need() -> None:
    quantized = convert(
        small(),
        recipe({"match": "0", "levels": "power_of_two"}, {"match": "1", "levels": "uniform"}),
    )
    assert bits_of(quantized) == {"0": (1, 4), "1": (1, 8), "3": (1, 8), "4": (1, 8)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [{"match": "conv"}],
            "No layer that can be quantized matches the override conv; .* \\* stands for",
        ),
        (
            [{"match": "2"}, {"type": "LSTM"}],
            "matches the overrides 2, LSTM;",  # a Flatten, and a type that is not there
        ),
        (
            [{"match": "3", "levels": "power_of_two", "bits": 5}],
            "3 is to have at least 5 bits, and levels that are power_of_two",
        ),
        (
            [{"match": "0", "min_bits": 5}, {"match": "0", "max_bits": 3}],
            "The overrides for 0 give min_bits 5 above max_bits 3",
        ),
    ],
)
def test_overrides_without_effect_are_refused(
    overrides: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        convert(small(), recipe(*overrides))


@pytest.mark.parametrize(
    ("bits", "overrides", "expected"),
    [
        pytest.param(4, [], [8, 4, 4, 8], id="first and last at 8"),
        pytest.param(8, [], [8, 8, 8, 8], id="all at 8"),
        pytest.param(None, [], [], id="float"),
        pytest.param(
            2,
            [{"match": "0", "act_bits": 6}, {"match": "4", "act_bits": 3}],
            [6, 2, 2, 3],
            id="unless overridden",
        ),
        pytest.param(2, [{"match": "0", "skip": True}], [2, 2, 8], id="the first stays float"),
    ],
)
def test_bits_of_the_inputs(
    bits: int | None, overrides: list[dict[str, Any]], expected: list[int]
) -> None:
    quantized = convert(small(), recipe(*overrides, act_bits=bits))
    assert [a.bits for a in quantized.activations.values()] == expected


def test_ends_of_a_transformer() -> None:
    """Token numbers are no input to quantize, and attention's own output layer is no last layer."""
    model = nn.Sequential(
        nn.Embedding(10, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.MultiheadAttention(8, 2)
    )
    quantized = convert(model, recipe(act_bits=4))
    assert {n: a.bits for n, a in quantized.activations.items()} == {
        "1.self_attn": 4,
        "1.linear1": 4,
        "1.linear2": 4,
        "2": 8,
    }
    inputs = {
        name: reason for name, reason in quantized.kept_float.items() if name.endswith("(input)")
    }
    assert inputs == {
        "1.self_attn.out_proj (input)": "attention reads this layer's weight past its forward",
        "2.out_proj (input)": "attention reads this layer's weight past its forward",
    }


def test_ranges_end_at_bit_widths_that_are_offered() -> None:
    offered = {"bits_offered": [8, 6, 4, 3, 2, 1], "min_bits": 2, "max_bits": 7}
    overrides = [{"match": "0", "bits": 8}, {"match": "1", "min_bits": 5}]
    assert bits_of(convert(small(), recipe(*overrides, **offered))) == {
        "0": (8, 8),
        "1": (6, 6),
        "3": (2, 6),
        "4": (2, 6),
    }
    message = r"4 may have 5 to 5 bits, and weights.bits_offered has none of these: \[8, 6, 4, 3"
    with pytest.raises(UsageError, match=message):
        convert(small(), recipe({"match": "4", "bits": 5}, **offered))
    convert(small(), recipe({"match": "4", "bits": 5, "skip": True}, **offered))
