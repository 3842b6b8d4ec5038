"""Size of each part of an exported file, and of one quantized tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor

GROUP_BYTES = 4 + 1 + 1  # scale, zero point and gates


def tensor_bytes(numel: Sequence[int], bits: Sequence[int]) -> int:
    """Return the stored bytes of a quantized tensor.

    Group g has `numel[g]` elements of `bits[g]` bits each. An activation has a level table and no
    elements: `tensor_bytes([0], [bits])`.
    """
    indices = (sum(n * s for n, s in zip(numel, bits, strict=True)) + 7) // 8
    return indices + _level_bytes(bits) + GROUP_BYTES * len(bits)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file by purpose."""

    indices: int
    levels: int
    scales: int  # with the zero points
    gates: int
    floats: int  # unquantized tensors of any dtype
    manifest: int  # names, shapes and meta, compressed
    header: int  # of safetensors
    tensors: dict[str, int]  # by name of a tensor or activation; the sum is `payload`

    @property
    def payload(self) -> int:
        """Bytes of all tensors: everything but the manifest and the header."""
        return self.indices + self.levels + self.scales + self.gates + self.floats

    @property
    def file(self) -> int:
        return self.payload + self.manifest + self.header


def measure(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, NDArray[Any]],
    *,
    header: int,
    file: int,
) -> Sizes:
    """Return a file's size by part, given the bytes of its header and of the whole file."""
    bits = [s for tensor in quantized for s in tensor.bits] + [table.bits for table in activations]
    in_records = {tensor.name: tensor.nbytes for tensor in quantized}
    in_records |= {table.name: table.nbytes for table in activations}
    unquantized = {name: array.nbytes for name, array in floats.items()}
    tensors = in_records | unquantized
    return Sizes(
        indices=sum(in_records.values()) - _level_bytes(bits) - GROUP_BYTES * len(bits),
        levels=_level_bytes(bits),
        scales=(GROUP_BYTES - 1) * len(bits),
        gates=len(bits),
        floats=sum(unquantized.values()),
        manifest=file - header - sum(tensors.values()),
        header=header,
        tensors=tensors,
    )


def _level_bytes(bits: Sequence[int]) -> int:
    return sum(1 << s for s in bits if s < 8)  # at 8 bits the levels are 0 to 255, and not stored
