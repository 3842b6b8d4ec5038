"""Packing: indices of 1 to 8 bits as a dense bit stream, least significant bit first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack(groups: Iterable[Bytes], bits: Sequence[int]) -> Bytes:
    """Pack groups of uint8 indices, group g at `bits[g]` bits, without padding between groups.

    The last byte is padded with zeros. `decoder.unpack` is the inverse. Raises ValueError if an
    index needs more bits.
    """
    streams = [np.zeros(0, np.uint8)]
    for indices, width in zip(groups, bits, strict=True):
        if not 1 <= width <= 8:
            raise ValueError(f"{width} bits is outside 1 to 8")
        if indices.dtype != np.uint8:
            raise ValueError(f"indices are {indices.dtype} where uint8 is expected")
        if indices.size and int(indices.max()) >= 1 << width:
            raise ValueError(f"index {int(indices.max())} does not fit in {width} bits")
        one_bit_each = np.unpackbits(indices.reshape(-1, 1), axis=1, count=width, bitorder="little")
        streams.append(one_bit_each.reshape(-1))
    return np.packbits(np.concatenate(streams), bitorder="little")
