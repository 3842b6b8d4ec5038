"""Sizes such as 150kB, 1.8MB and 12% are parsed."""

from __future__ import annotations

import pytest

from ddqcli.recipe.size import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("150kB", 150_000),
        ("1.8MB", 1_800_000),
        ("96KiB", 98_304),
        ("12%", 960),
        (".5kb", 500),
        (" 1 GB ", 10**9),
        ("7", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, 8000) == size


@pytest.mark.parametrize(
    "text", ["", "kB", "-1kB", "0", "0%", "1e3", "1 TB", "1.2.3kB", "12%%", "nan"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|less than one byte"):
        parse_size(text, 8000)
