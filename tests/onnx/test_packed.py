"""Packed integers: onnxruntime unpacks what was stored, and the file is as small as can be."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ddqcli.onnx.graph import Graph
from ddqcli.onnx.packed import CODES, Code, add_integers, distinct, split_codes


def stored(integers: np.ndarray, axis: int | None, floats: bool = False) -> onnx.ModelProto:
    """Return a model without inputs whose output is the stored tensor."""
    dtype = TensorProto.FLOAT if floats else TensorProto.INT8
    output = helper.make_tensor_value_info("out", dtype, integers.shape)
    graph = Graph(helper.make_graph([], "stored", [], [output]))
    value = add_integers(graph, "weight", integers, axis, floats=floats)
    assert add_integers(graph, "again", integers.copy(), axis, floats=floats) == value
    graph.add_node("Identity", [value], "out")
    graph.finish()
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph.proto, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def unpacked(model: onnx.ModelProto, optimized: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (out,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {})
    return np.asarray(out)


def random_integers(shape: tuple[int, ...], values: int, seed: int = 0) -> np.ndarray:
    """Return integers that take just so many values, the extremes of int8 among them."""
    random = np.random.default_rng(seed)
    inner = random.choice(np.arange(-127, 127), max(0, values - 2), replace=False)
    table = np.append(inner, [-128, 127])[-values:].astype(np.int8)
    return np.append(table, random.choice(table, int(np.prod(shape)) - values)).reshape(shape)


@pytest.mark.parametrize("floats", [False, True], ids=["int8", "float32"])
@pytest.mark.parametrize(
    ("values", "bits"),
    [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4), (17, 5), (32, 5), (33, 6), (64, 6)],
)
def test_what_is_unpacked_is_what_was_stored(values: int, bits: int, floats: bool) -> None:
    for shape in ((24, 16, 3, 5), (1, 4999), (71, 7, 11)):  # whole bytes, and remainders
        integers = random_integers(shape, values, bits)
        model = stored(integers, 0, floats)
        for optimized in (True, False):
            found = unpacked(model, optimized)
            assert found.dtype == (np.float32 if floats else np.int8)
            assert np.array_equal(found, integers)
        nbytes = len(model.SerializeToString())
        assert integers.size * bits / 8 + 2**bits <= nbytes < integers.size * bits / 8 + 1300
        assert not {node.op_type for node in model.graph.node} & {"BitShift", "BitwiseAnd"}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_with_values_of_their_own(axis: int) -> None:
    shape = [9, 9, 9]
    shape[axis] = 90
    slices = np.stack([random_integers((9, 9), 3, seed) for seed in range(90)])
    integers = np.ascontiguousarray(np.moveaxis(slices, 0, axis))
    assert integers.shape == tuple(shape)
    assert len(np.unique(integers)) > 64
    model = stored(integers, axis)
    assert np.array_equal(unpacked(model), integers)
    assert np.array_equal(unpacked(stored(integers, axis, True)), integers)
    assert len(model.SerializeToString()) < integers.size / 2
    assert len(stored(integers, None).graph.initializer) == 1, "without an axis there is one table"


@pytest.mark.parametrize(
    "integers",
    [
        random_integers((8, 8), 4),  # the nodes would take more
        random_integers((100, 100), 65),
        random_integers((256, 256), 255),
        np.zeros((0, 3), np.int8),
    ],
    ids=["small", "65 values", "255 values", "empty"],
)
def test_what_packing_does_not_shrink_is_stored_as_it_is(integers: np.ndarray) -> None:
    model = stored(integers, None)
    (tensor,) = model.graph.initializer
    assert tensor.raw_data == integers.tobytes()
    assert np.array_equal(unpacked(model), integers)


def test_distinct_values_by_brute_force() -> None:
    rows = np.array([[3, -128, 3, 127], [5, 5, 5, 5]], np.int8)
    values, indices = distinct(rows)
    assert values.tolist() == [[-128, 3, 127], [5, 5, 5]]
    assert np.take_along_axis(values, indices.astype(int), 1).tolist() == rows.tolist()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_codes_by_brute_force(code: Code) -> None:
    count = code.block * 3 - 1
    indices = np.random.default_rng(1).integers(0, 2**code.bits, count).astype(np.uint8)
    low, high = split_codes(indices, code)
    padded = [*indices.tolist(), *[0] * (3 * code.block - count)]
    codes = [
        sum(index << code.bits * k for k, index in enumerate(padded[start : start + code.length]))
        for start in range(0, len(padded), code.length)
    ]
    assert low.tolist() == [number % 256 for number in codes]
    above = [number // 256 for number in codes]
    read = [
        byte >> code.high_bits * k & (1 << code.high_bits) - 1
        for byte in high.tolist()
        for k in range(code.high_length)
    ]
    assert read == above
    assert 8 * (low.size + high.size * (code.high_bits > 0)) == len(padded) * code.bits
