"""Packing and unpacking, against one bit after another."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ddqcli.artifact
from ddqcli.artifact.decoder import unpack
from ddqcli.artifact.packing import pack


def bit_by_bit(groups: list[list[int]], bits: list[int]) -> bytes:
    stream = [
        index >> bit & 1
        for group, width in zip(groups, bits, strict=True)
        for index in group
        for bit in range(width)
    ]
    stream += [0] * (-len(stream) % 8)
    return bytes(
        sum(bit << place for place, bit in enumerate(stream[at : at + 8]))
        for at in range(0, len(stream), 8)
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1000])
def test_equals_bit_by_bit_oracle(bits: int, n: int) -> None:
    indices = np.random.default_rng(n).integers(0, 2**bits, n, dtype=np.uint8)
    packed = pack([indices], [bits])
    assert packed.tobytes() == bit_by_bit([indices.tolist()], [bits])
    assert len(packed) == -(-n * bits // 8)
    assert np.array_equal(unpack(packed, bits, n), indices)


@given(
    st.lists(
        st.integers(1, 8).flatmap(
            lambda s: st.tuples(st.just(s), st.lists(st.integers(0, 2**s - 1)))
        )
    )
)
def test_groups_of_any_bits_follow_without_padding(groups: list[tuple[int, list[int]]]) -> None:
    bits, indices = [s for s, _ in groups], [values for _, values in groups]
    packed = pack([np.array(values, np.uint8) for values in indices], bits)
    assert packed.tobytes() == bit_by_bit(indices, bits)


@pytest.mark.parametrize("bits", [*range(1, 9), 10, 12])
def test_codes_of_up_to_12_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, 100)
    packed = np.frombuffer(bit_by_bit([codes.tolist()], [bits]), np.uint8)
    assert unpack(packed, bits, 100).tolist() == codes.tolist()


def test_the_specification_packs_as_it_says() -> None:
    page = (Path(ddqcli.artifact.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    first, second = re.findall(r"packed = ([0-9A-F ]+)", page)
    assert bit_by_bit([[5, 1, 7, 0, 2, 6, 3, 4, 1]], [3]) == bytes.fromhex(first)
    assert bit_by_bit([[5, 1, 7], [1, 0, 1], [9, 2, 15]], [3, 1, 4]) == bytes.fromhex(second)
    assert pack([np.array([5, 1, 7, 0, 2, 6, 3, 4, 1], np.uint8)], [3]).tobytes() == bytes.fromhex(
        first
    )


@pytest.mark.parametrize(
    ("indices", "bits", "fault"),
    [
        (np.array([4], np.uint8), 2, "index 4 does not fit in 2 bits"),
        (np.array([1], np.int64), 2, "int64 where uint8"),
        (np.array([1], np.uint8), 0, "0 bits"),
        (np.array([1], np.uint8), 9, "9 bits"),
    ],
)
def test_refuses_what_cannot_be_packed(indices: np.ndarray, bits: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        pack([indices], [bits])
