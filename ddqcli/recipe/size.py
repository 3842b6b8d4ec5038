"""Sizes such as 150kB, 1.8MB or 12% in bytes."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
}


def parse_size(text: str, float_bytes: int) -> int:
    """Bytes meant by `150kB`, `1.8MB`, `96KiB` or `12%` (of float_bytes). Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kKmMgG]?[iI]?[bB]?)\s*", text)
    shown = repr(text if len(text) <= 30 else f"{text[:30]}...")
    if not found or found[2].lower() not in {"%", *_UNITS}:
        raise ValueError(f"{shown} is not a size; write 150kB, 1.8MB, 96KiB or 12%")
    number = float(found[1])
    size = number / 100 * float_bytes if found[2] == "%" else number * _UNITS[found[2].lower()]
    if not 1 <= size < 2**63:
        raise ValueError(
            f"{shown} is {'less than one byte' if size < 1 else 'more than a file can have'}"
        )
    return int(size)
