"""An ONNX graph under rewriting: who produces and uses a value, constants, and new nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, numpy_helper

Array = NDArray[Any]


class Graph:
    """The old nodes of a graph, indexed by value, and the new nodes that replace them."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.proto = proto
        self.nodes: list[NodeProto] = []  # new
        self.outputs = {output.name for output in proto.output}
        self.shapes = {
            value.name: _shape(value) for value in (*proto.value_info, *proto.input, *proto.output)
        }
        self._constants = {tensor.name: tensor for tensor in proto.initializer}
        self._producers = {name: node for node in proto.node for name in node.output}
        self._users: dict[str, list[NodeProto]] = {}
        for node in proto.node:
            # CastLike takes only the type of its second input.
            inputs = node.input[:1] if node.op_type == "CastLike" else node.input
            for name in set(inputs):
                self._users.setdefault(name, []).append(node)
        self._names: Counter[str] = Counter()

    def producer(self, name: str, op_type: str) -> NodeProto | None:
        """Return the old node that produces a value if it is an `op_type`."""
        node = self._producers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def only_user(self, name: str) -> NodeProto | None:
        """Return the old node that uses a value if there is one, and nothing else sees it."""
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def value(self, name: str) -> Array | None:
        """Return a constant; None if the value is computed."""
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name])
        node = self._producers.get(name)
        if node is None or node.op_type not in ("Constant", "Cast", "CastLike", "Identity"):
            return None
        if node.op_type != "Constant":
            return self.value(node.input[0])
        (value,) = attributes(node).values()
        return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.array(value)

    def constant(self, name: str) -> Array:
        """Return a value that must be constant."""
        value = self.value(name)
        assert value is not None, name
        return value

    def new_name(self, name: str) -> str:
        """Return `name`, or name.2, name.3, ... if it was asked for before."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}.{self._names[name]}"

    def add_node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node and return its output."""
        node = onnx.helper.make_node(op_type, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def add_constant(self, name: str, value: Array) -> str:
        """Store a constant and return its name."""
        self._constants[name] = numpy_helper.from_array(value, name)
        self.proto.initializer.append(self._constants[name])
        return name

    def shared_constant(self, name: str, value: Array) -> str:
        """Store a constant unless one of this name is stored, and return its name."""
        return name if name in self._constants else self.add_constant(name, value)

    def add_reshape(self, x: str, shape: list[int]) -> str:
        target = self.shared_constant(f"shape {shape}", np.array(shape, np.int64))
        return self.add_node("Reshape", [x, target], self.new_name(f"{x}.reshaped"))

    def add_dequantize(
        self, name: str, integers: Array, scale: Array, zero_point: Array, axis: int | None
    ) -> str:
        """Add (integers - zero_point) * scale along `axis`, or of one scale if that is None."""
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        base = self.new_name(name)
        inputs = [
            self.add_constant(f"{base}.{part}", np.ascontiguousarray(value))
            for part, value in (
                ("integers", integers),
                ("scale", scale),
                ("zero_point", zero_point),
            )
        ]
        axis_attribute = {} if axis is None else {"axis": axis}
        return self.add_node("DequantizeLinear", inputs, f"{base}.value", **axis_attribute)

    def finish(self) -> None:
        """Put the new nodes into the graph, as far as its outputs need them.

        Shapes of values and traces of the source code are removed.
        """
        needed, nodes = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                node.ClearField("metadata_props")
                nodes.append(node)
        initializers = [tensor for tensor in self.proto.initializer if tensor.name in needed]
        del self.proto.node[:], self.proto.initializer[:], self.proto.value_info[:]
        self.proto.node.extend(reversed(nodes))
        self.proto.initializer.extend(initializers)
        self.proto.ClearField("metadata_props")
        for value in (*self.proto.input, *self.proto.output):
            value.ClearField("metadata_props")
            dims = value.type.tensor_type.shape.dim
            if dims and dims[0].dim_param:
                dims[0].dim_param = "batch"


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _shape(value: ValueInfoProto) -> list[int | None]:
    """Return the sizes; None for open ones."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
