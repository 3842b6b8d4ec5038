"""An ONNX file read back: each tensor, node and unpacked weight is compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from ddqcli.errors import VerificationError
from ddqcli.onnx.export import OnnxModel
from ddqcli.onnx.graph import live_nodes
from ddqcli.onnx.seal import opened, properties

_EXPORTER = "exporter"


def require_same_model(raw: bytes, expected: OnnxModel, name: Path) -> tuple[str, ...]:
    """Compare a file with what the run exports. Returns what was left unchecked, and why.

    Raises VerificationError, which calls the file `name`, if a bit differs, or if onnxruntime
    unpacks anything but the trained weights.
    """
    found = opened(raw, str(name))
    theirs, ours = (properties(proto).get(_EXPORTER) for proto in (found, expected.proto))
    same_exporter = theirs == ours
    stored, trained = (
        {t.name: t.SerializeToString(deterministic=True) for t in proto.graph.initializer}
        for proto in (found, expected.proto)
    )
    common = stored.keys() & trained.keys()
    tensors = [tensor for tensor in trained if tensor in common or same_exporter]
    if different := [tensor for tensor in tensors if stored.get(tensor) != trained[tensor]]:
        raise VerificationError(f"{name} differs from what was trained in {different[0]}.")
    if not same_exporter:
        return (f"the nodes of {name}: they are of {theirs}, and here is {ours}",)
    if raw != expected.raw:
        raise VerificationError(f"{name} differs from what was trained in its nodes or metadata.")
    _require_same_weights(found, expected, name)
    return ()


def _require_same_weights(found: onnx.ModelProto, expected: OnnxModel, name: Path) -> None:
    """Let onnxruntime unpack the weights alone, without its optimizations."""
    import onnxruntime

    wanted = list(expected.unpacked)
    if not wanted:
        return
    part = onnx.ModelProto()
    part.CopyFrom(found)
    graph = part.graph
    nodes = live_nodes(found.graph.node, wanted)
    used = {value for node in nodes for value in node.input} | set(wanted)
    del graph.node[:], graph.input[:], graph.output[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(t for t in found.graph.initializer if t.name in used)
    graph.output.extend(
        onnx.helper.make_tensor_value_info(
            value, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for value, array in expected.unpacked.items()
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    runtime = onnxruntime.InferenceSession(part.SerializeToString(), options)
    for value, array in zip(wanted, runtime.run(wanted, {}), strict=True):
        if array.dtype != expected.unpacked[value].dtype or not np.array_equal(
            array, expected.unpacked[value]
        ):
            raise VerificationError(
                f"onnxruntime unpacks other weights of {name} than were trained ({value})."
            )
