"""Numbers and names as short text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Control characters, line separators, and what turns the direction of text or has no width.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return the text as one line, with escapes such as \\n or \\x1b for what steers a terminal.

    Names of layers and files may come from anyone.
    """
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def size(number: float) -> str:
    """Format bytes with three digits: 512 B, 17.9 kB, 1.08 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """Format a number of parameters with three digits: 864, 2.30k, 1.28M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return _three_digits(number / factor) + unit
    return f"{number:.0f}"


def percent(share: float) -> str:
    """Format a share as percent in at most five characters: 12, 3.5, 0.94, 0.004, <.001."""
    value = 100 * share
    if 0 < value < 0.0005:
        return "<.001"
    if value == 0 or value >= 9.95:
        decimals = 0
    elif value >= 0.995:
        decimals = 1
    elif value >= 0.0995:
        decimals = 2
    else:
        decimals = 3
    return f"{value:.{decimals}f}"


def duration(seconds: float) -> str:
    """Format a time as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def shorten(name: str, width: int, dots: str = "…") -> str:
    """Abbreviate a dotted name to at most `width` characters.

    Words are cut and numbers stay, since numbers tell layers apart: den…1.den…10.conv1. A name that
    is still too long is cut in the middle.
    """
    name = visible(name)
    if len(name) <= width:
        return name
    *parents, last = name.split(".")
    for letters in (8, 6, 4, 3, 2, 1):
        short = ".".join([*(_abbreviate(parent, letters, dots) for parent in parents), last])
        if len(short) <= width:
            return short
    tail = (width - 1) * 2 // 3
    return name[: width - 1 - tail] + dots + name[len(name) - tail :]


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer2 before layer10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _abbreviate(part: str, letters: int, dots: str) -> str:
    """Cut the word of `part` to so many letters and keep the number at its end."""
    word = part.rstrip("0123456789")
    return word[:letters] + dots + part[len(word) :] if len(word) > letters + 1 else part


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def did_you_mean(wrong: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return `; did you mean NAME?` for the closest of the names, or nothing; `prefix` it."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
