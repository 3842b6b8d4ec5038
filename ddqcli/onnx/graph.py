"""An ONNX graph under rewriting: who produces and uses a value, constants, and new nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, numpy_helper

Array = NDArray[Any]
FLOAT, INT32 = int(TensorProto.FLOAT), int(TensorProto.INT32)


class Graph:
    """The old nodes of a graph, indexed by value, and the new nodes that replace them.

    Nodes that no output depends on are left out.
    """

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.proto = proto
        self.outputs = {output.name for output in proto.output}
        self.old_nodes = live_nodes(proto.node, self.outputs)
        self.nodes: list[NodeProto] = []  # new
        values = [*proto.value_info, *proto.input, *proto.output]
        self.shapes = {value.name: _shape(value) for value in values}
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._constants = {tensor.name: tensor for tensor in proto.initializer}
        self._producers = {name: node for node in self.old_nodes for name in node.output}
        self._users: dict[str, list[NodeProto]] = {}
        for node in self.old_nodes:
            # CastLike takes only the type of its second input.
            inputs = node.input[:1] if node.op_type == "CastLike" else node.input
            for name in set(inputs):
                self._users.setdefault(name, []).append(node)
        self._names: Counter[str] = Counter()
        self._shared: dict[str, str] = {}
        self.unpacked: dict[str, Array] = {}  # what the values of packed tensors are

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
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def add_constant(self, name: str, value: Array) -> str:
        """Store a constant and return its name."""
        self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        self.proto.initializer.append(self._constants[name])
        return name

    def shared_constant(self, name: str, value: Array) -> str:
        """Store a constant unless an equal one is stored here, and return its name."""
        key = f"{value.dtype} {value.shape} {value.tobytes()!r}"
        return self.shared(key, lambda: self.add_constant(f"{name} {len(self._shared)}", value))

    def shared(self, key: str, add: Callable[[], str]) -> str:
        """Return what `add` returned when it was first called for this key."""
        if key not in self._shared:
            self._shared[key] = add()
        return self._shared[key]

    def filled(self, value: Array) -> str:
        """Return a value of equal elements: a node of a few bytes, shared by all that need it."""

        def add() -> str:
            size = self.shared_constant("shape", np.array(value.shape))
            element = numpy_helper.from_array(value.reshape(-1)[:1])
            return self.add_node("ConstantOfShape", [size], self.new_name("filled"), value=element)

        return self.shared(f"filled {value.dtype} {value.shape} {value.reshape(-1)[0]}", add)

    def int32(self, number: int) -> str:
        """Return a scalar constant."""
        return self.shared_constant("number", np.array(number, np.int32))

    def add_reshape(self, x: str, shape: Sequence[int]) -> str:
        target = self.shared_constant("shape", np.array(shape, np.int64))
        return self.add_node("Reshape", [x, target], self.new_name(f"{x}.reshaped"))

    def finish(self) -> None:
        """Put the new nodes into the graph, as far as its outputs need them.

        Shapes of values and traces of the source code are removed, and values get short names.
        """
        nodes = live_nodes(self.nodes, self.outputs)
        used = {name for node in nodes for name in _inputs(node)} | self.outputs
        initializers = [tensor for tensor in self.proto.initializer if tensor.name in used]
        del self.proto.node[:], self.proto.initializer[:], self.proto.value_info[:]
        self.proto.node.extend(nodes)
        self.proto.initializer.extend(initializers)
        self.proto.ClearField("metadata_props")
        for node in self.proto.node:
            node.ClearField("metadata_props")
            node.ClearField("name")
        self._shorten_names()
        for value in (*self.proto.input, *self.proto.output):
            value.ClearField("metadata_props")
            dims = value.type.tensor_type.shape.dim
            if dims and dims[0].dim_param:
                dims[0].dim_param = "batch"

    def _shorten_names(self) -> None:
        """Number the values that nodes compute; constants keep their names."""
        inner = {name for node in self.proto.node for name in _inner_inputs(node)}
        fixed = {value.name for value in (*self.proto.input, *self.proto.output)} | inner
        taken = fixed | {tensor.name for tensor in self.proto.initializer}
        free = (name for number in count() if (name := f"v{number}") not in taken)
        short: dict[str, str] = {}
        for node in self.proto.node:
            node.input[:] = [short.get(name, name) for name in node.input]
            short |= {name: next(free) for name in node.output if name and name not in fixed}
            node.output[:] = [short.get(name, name) for name in node.output]
        self.unpacked = {
            short.get(name, name): value
            for name, value in self.unpacked.items()
            if name in short or name in taken
        }


def live_nodes(nodes: Iterable[NodeProto], outputs: Collection[str]) -> list[NodeProto]:
    """Return the nodes that these values depend on, in order."""
    needed, live = set(outputs), []
    for node in reversed(list(nodes)):
        if needed & set(node.output):
            needed |= set(_inputs(node))
            live.append(node)
    return live[::-1]


def _inputs(node: NodeProto) -> list[str]:
    """Return the values that a node uses, in its subgraphs too."""
    return [*node.input, *_inner_inputs(node)]


def _inner_inputs(node: NodeProto) -> Iterator[str]:
    """Yield the values that the subgraphs of a node use, their own among them."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _inputs(inner)
            yield from (output.name for output in graph.output)


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _shape(value: ValueInfoProto) -> list[int | None]:
    """Return the sizes; None for open ones."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
