"""Integers of few distinct values as packed indices, with the nodes that unpack them.

onnxruntime folds these nodes when it loads the file, and then computes with the same int8 tensors
as if they lay in the file. A code stands for several indices; a table holds the values of each:

    packed -> Cast -> Gather from table -> Reshape      table = Gather from values, by digits

Cast, Gather and plain arithmetic only: OpenVINO computes wrong values of BitShift and BitwiseAnd.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

from ddqcli.onnx.graph import FLOAT, INT32, Array, Graph

_NODE_BYTES = 400  # of the nodes that unpack one tensor, about


class Code(NamedTuple):
    """A number that stands for `length` indices of `bits` bits each, the first one lowest.

    A code of more than 8 bits is stored as its lowest byte and the rest, which is packed again.
    """

    bits: int
    length: int

    @property
    def high_bits(self) -> int:
        return self.bits * self.length - 8

    @property
    def high_length(self) -> int:
        """Codes whose high bits share a byte."""
        return 8 // self.high_bits if self.high_bits else 1

    @property
    def block(self) -> int:
        """Indices that fill whole bytes."""
        return self.length * self.high_length


CODES = [Code(1, 8), Code(2, 4), Code(3, 4), Code(4, 2), Code(5, 2), Code(6, 2)]  # 7 saves little


def add_integers(
    graph: Graph, name: str, integers: Array, axis: int | None, *, floats: bool = False
) -> str:
    """Store int8 `integers` once, packed if that saves bytes, and return their value.

    The distinct values of the tensor are stored, or if they are too many, those of each slice along
    `axis`. With `floats` the value is float32.
    """
    content = hashlib.sha256(integers.tobytes()).hexdigest()
    key = f"{integers.shape} {floats} {content}"
    value = graph.shared(key, lambda: _add_integers(graph, name, integers, axis, floats))
    graph.unpacked[value] = integers.astype(np.float32) if floats else integers
    return value


def _add_integers(graph: Graph, name: str, integers: Array, axis: int | None, floats: bool) -> str:
    values, indices = distinct(integers.reshape(1, -1))
    by_slice = axis is not None and values.shape[1] > 1 << CODES[-1].bits
    if by_slice:
        slices = np.moveaxis(integers, axis or 0, 0)
        values, indices = distinct(slices.reshape(len(slices), -1))
    code = next((code for code in CODES if values.shape[1] <= 1 << code.bits), None)
    packed = code and indices.size * code.bits // 8 + values.size + _NODE_BYTES < integers.size
    if code is None or not packed:
        stored = graph.add_constant(f"{name}.integers", integers)
        return graph.add_node("Cast", [stored], f"{name}.float", to=FLOAT) if floats else stored
    codes = _add_codes(graph, name, *split_codes(indices.reshape(-1), code), code)
    # An entry for each index, since the tables hold those too that do not occur.
    values = np.pad(values, [(0, 0), (0, (1 << code.bits) - values.shape[1])], "edge")
    stored = graph.add_constant(f"{name}.values", values if by_slice else values[0])
    if floats:
        stored = graph.add_node("Cast", [stored], f"{name}.float", to=FLOAT)
    if by_slice:
        unpacked = graph.add_node("Gather", [_digits(graph, code), codes], f"{name}.indices")
        rows = _cut(graph, unpacked, code, indices.shape)
        found = graph.add_node("GatherElements", [stored, rows], f"{name}.unpacked", axis=1)
        order = list(range(1, integers.ndim))
        order.insert(axis or 0, 0)
        moved = graph.add_reshape(found, slices.shape)
        return graph.add_node("Transpose", [moved], f"{name}.in_order", perm=order)
    table = graph.add_node("Gather", [stored, _digits(graph, code)], f"{name}.table")
    unpacked = graph.add_node("Gather", [table, codes], f"{name}.unpacked")
    return _cut(graph, unpacked, code, integers.shape)


def distinct(rows: Array) -> tuple[Array, Array]:
    """Return each row's distinct values in ascending order, int8 [R, most], and indices of them.

    A row of fewer values repeats its last one.
    """
    unsigned = rows.view(np.uint8) ^ 128  # in the order of the values
    present = [np.flatnonzero(np.bincount(row, minlength=256)) for row in unsigned]
    most = max(map(len, present), default=0)
    values = np.stack([np.append(v, np.repeat(v[-1:], most - len(v))) for v in present])
    indices = np.empty_like(unsigned)
    for row, row_values, out in zip(unsigned, present, indices, strict=True):
        index_of = np.zeros(256, np.uint8)
        index_of[row_values] = np.arange(len(row_values))
        out[:] = index_of[row]
    return (values.astype(np.uint8) ^ 128).view(np.int8), indices


def split_codes(indices: Array, code: Code) -> tuple[Array, Array]:
    """Return the lowest byte of each code, and the bits above packed into bytes."""
    padded = np.zeros(-(-len(indices) // code.block) * code.block, np.int32)
    padded[: len(indices)] = indices
    codes = _joined(padded.reshape(-1, code.length), code.bits)
    high = _joined((codes >> 8).reshape(-1, code.high_length), code.high_bits)
    return (codes & 255).astype(np.uint8), high.astype(np.uint8)


def _joined(digits: Array, bits: int) -> Array:
    """Return the number that each row of digits is in base 2^bits, lowest first."""
    joined: Array = (digits << bits * np.arange(digits.shape[1])).sum(1)
    return joined


def _add_codes(graph: Graph, name: str, low: Array, high: Array, code: Code) -> str:
    """Store the codes as `split_codes` returns them; return their value, int32 [n]."""
    codes = graph.add_node(
        "Cast", [graph.add_constant(f"{name}.packed", low)], f"{name}.codes", to=INT32
    )
    if not code.high_bits:
        return codes

    def add_table() -> str:
        digits = _digits(graph, Code(code.high_bits, code.high_length))
        return graph.add_node("Mul", [digits, graph.int32(256)], graph.new_name("high digits"))

    table = graph.shared(f"high digits of {code}", add_table)
    packed = graph.add_constant(f"{name}.packed_high", high)
    high_codes = graph.add_node("Cast", [packed], f"{name}.high_codes", to=INT32)
    rows = graph.add_node("Gather", [table, high_codes], f"{name}.high")
    return graph.add_node("Add", [codes, graph.add_reshape(rows, [-1])], f"{name}.all_bits")


def _digits(graph: Graph, code: Code) -> str:
    """Return the indices that each code stands for, int32 [number of codes, length]."""

    def add() -> str:
        base = f"{code.length} x {code.bits} bits"
        numbers = [graph.int32(number) for number in (0, 1 << code.bits * code.length, 1)]
        powers = 1 << code.bits * np.arange(code.length, dtype=np.int32)
        column = graph.add_reshape(graph.add_node("Range", numbers, f"{base} numbers"), [-1, 1])
        shifted = graph.add_node(
            "Div", [column, graph.add_constant(f"{base} powers", powers)], f"{base} shifted"
        )
        return graph.add_node("Mod", [shifted, graph.int32(1 << code.bits)], f"{base} digits")

    return graph.shared(f"digits of {code}", add)


def _cut(graph: Graph, rows: str, code: Code, shape: tuple[int, ...]) -> str:
    """Reshape unpacked indices or values to `shape`, without those that pad."""
    numel = math.prod(shape)
    if numel % code.block:
        ends = [graph.shared_constant("end", np.array([k], np.int64)) for k in (0, numel)]
        flat = graph.add_reshape(rows, [-1])
        rows = graph.add_node("Slice", [flat, *ends], graph.new_name(f"{flat}.cut"))
    return graph.add_reshape(rows, shape)
