"""Parse sizes such as 150kB, 1.8MB or 12%."""

from __future__ import annotations

import re

_UNITS = {
    **{"": 1, "b": 1},
    **{"kb": 1000, "mb": 1000**2, "gb": 1000**3},
    **{"kib": 1024, "mib": 1024**2, "gib": 1024**3},
}


def parse_size(text: str, float_bytes: int) -> int:
    """Return the bytes of `150kB`, `1.8MB`, `96KiB`, or `12%` of `float_bytes`.

    Raises ValueError for other texts, less than one byte, or more than a file can hold.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kKmMgG]?[iI]?[bB]?)\s*", text)
    shown = repr(text if len(text) <= 30 else f"{text[:30]}...")
    if not match or match[2].lower() not in {"%", *_UNITS}:
        raise ValueError(f"{shown} is not a size; write 150kB, 1.8MB, 96KiB or 12%")
    number, unit = float(match[1]), match[2].lower()
    size = number / 100 * float_bytes if unit == "%" else number * _UNITS[unit]
    if not 1 <= size < 2**63:
        fault = "less than one byte" if size < 1 else "more than a file can have"
        raise ValueError(f"{shown} is {fault}")
    return int(size)
