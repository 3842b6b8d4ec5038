"""Indices of 1 to 8 bits as a dense stream of bits, least significant bit first, padded in the last byte only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack(groups: Iterable[Bytes], bits: Sequence[int]) -> Bytes:
    """Runs of uint8 indices, each of its own bits, one after another without padding between them; `decoder.unpack` reads them.

    Raises ValueError on an index that needs more bits.
    """
    streams = [np.zeros(0, np.uint8)]
    for indices, width in zip(groups, bits, strict=True):
        if not 1 <= width <= 8:
            raise ValueError(f"{width} bits is outside 1 to 8")
        if indices.dtype != np.uint8:
            raise ValueError(f"indices are {indices.dtype} where uint8 is expected")
        if indices.size and int(indices.max()) >= 1 << width:
            raise ValueError(f"index {int(indices.max())} does not fit in {width} bits")
        streams.append(
            np.unpackbits(indices.reshape(-1, 1), axis=1, count=width, bitorder="little").reshape(
                -1
            )
        )
    return np.packbits(np.concatenate(streams), bitorder="little")
