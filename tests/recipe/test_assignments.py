"""`--set key=value` is parsed as YAML and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_files import load_recipe

from ddqcli.errors import UsageError
from ddqcli.recipe.assignments import parse_assignment
from ddqcli.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.02", ("train.lr", 0.02)),
        (
            "train.lr=2e-2",
            ("train.lr", "2e-2"),
        ),  # which YAML takes for text, and the recipe for a number
        ("data.mean=[0.5, 0.4, 0.3]", ("data.mean", [0.5, 0.4, 0.3])),
        ("model.kwargs.layer1_Width=3", ("model.kwargs.layer1_Width", 3)),
        ("name=a=b", ("name", "a=b")),
        ("weights.bias_bits=null", ("weights.bias_bits", None)),
    ],
)
def test_an_assignment_is_read_as_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_assignment(text) == expected
    assert isinstance(load_recipe(None, dict([expected])), Recipe)


@pytest.mark.parametrize(
    "text",
    ["", "=", "train.lr", "train..lr=1", "train lr=1", ".lr=1", "train.lr =[", "a=2026-99-99"],
)
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_assignment(text)


@pytest.mark.parametrize("key", ["train.lr.x", "overrides.0.bits"])
def test_a_flag_below_what_has_no_fields_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ddq.yaml"
    path.write_text("train: {lr: 0.1}\noverrides: [{type: Linear, bits: 8}]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be set"):
        load_recipe(path, {key: 3})
