"""Indices of 1 to 8 bits as a dense stream of bits, least significant bit first, padded in the last byte only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder

Bytes = NDArray[np.uint8]


def pack(indices: Bytes, bits: int) -> Bytes:
    """uint8 [N], each below 2^bits, as uint8 [ceil(N * bits / 8)]; ValueError on an index that needs more bits."""
    return pack_groups([indices], [bits])


def pack_groups(groups: Sequence[Bytes], bits: Sequence[int]) -> Bytes:
    """Several runs of indices, each of its own bits, one after another without padding between them."""
    streams = [np.zeros(0, np.uint8)]
    for indices, width in zip(groups, bits, strict=True):
        _check(width)
        if indices.dtype != np.uint8:
            raise ValueError(f"indices are {indices.dtype} where uint8 is expected")
        if indices.size and int(indices.max()) >= 1 << width:
            raise ValueError(f"index {int(indices.max())} does not fit in {width} bits")
        streams.append(np.unpackbits(indices.reshape(-1, 1), axis=1, count=width, bitorder="little").reshape(-1))
    return np.packbits(np.concatenate(streams), bitorder="little")


def unpack(packed: Bytes, bits: int, n: int) -> Bytes:
    """The inverse of `pack`: uint8 [n]; ValueError where `packed` has not the length of n indices."""
    _check(bits)
    if n < 0 or len(packed) != (n * bits + 7) // 8:
        raise ValueError(f"{n} indices of {bits} bits take {(n * bits + 7) // 8} bytes, not {len(packed)}")
    return decoder.unpack(packed, bits, n)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits is outside 1 to 8")
