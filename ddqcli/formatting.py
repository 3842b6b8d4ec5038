"""Numbers and names as short text: three digits are enough to compare by."""

from __future__ import annotations

import re


def size(number: float) -> str:
    """Bytes with three digits: 512 B, 17.9 kB, 1.08 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * factor:
            return f"{_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """Parameters with three digits: 864, 2.30k, 1.28M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return _digits(number / factor) + unit
    return f"{number:.0f}"


def percent(share: float) -> str:
    """A share in per cent in up to five columns: 12, 3.5, 0.94, 0.004, <.001."""
    value = 100 * share
    if 0 < value < 0.0005:
        return "<.001"
    places = (
        0 if value >= 9.95 or not value else 1 if value >= 0.995 else 2 if value >= 0.0995 else 3
    )
    return f"{value:.{places}f}"


def shorten(name: str, width: int, dots: str = "…") -> str:
    """A dotted name in at most `width` columns: den…1.den…10.conv1 keeps the numbers, which tell layers apart.

    A name of which that leaves too much is cut in the middle.
    """
    if len(name) <= width:
        return name
    *parts, last = name.split(".")
    for letters in (8, 6, 4, 3, 2, 1):
        short = ".".join([*(_abbreviated(part, letters, dots) for part in parts), last])
        if len(short) <= width:
            return short
    tail = (width - 1) * 2 // 3
    return name[: width - 1 - tail] + dots + name[len(name) - tail :]


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer2 before layer10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _abbreviated(part: str, letters: int, dots: str) -> str:
    word = part.rstrip("0123456789")
    return word[:letters] + dots + part[len(word) :] if len(word) > letters + 1 else part


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
