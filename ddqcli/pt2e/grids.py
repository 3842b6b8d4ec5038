"""The int8 grid of each value between operators, and the quantizers that put it there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed

LAYERS = {aten.conv1d.default, aten.conv2d.default, aten.linear.default}
QUANTIZE = decomposed.quantize_per_tensor.default
DEQUANTIZE = decomposed.dequantize_per_tensor.default

_CLIPS = {aten.relu.default, aten.hardtanh.default, aten.relu6.default}
_MOVES = {  # values stay on their grid
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.max_pool2d.default,
    aten.pad.default,
    aten.cat.default,
}
_ARITHMETIC = {
    aten.add.Tensor,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.mean.dim,
}


class Grid(NamedTuple):
    """An int8 grid: value = (code - zero_point) * scale, codes -128 to 127."""

    scale: float
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """Return the grid over a range, with 0 as one of its points."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max(high - low, 1e-12) / 255))
        return cls(scale, round(-128 - low / scale))

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """Arguments of QUANTIZE and DEQUANTIZE after the tensor."""
        return self.scale, self.zero_point, -128, 127, torch.int8


class Ranges(fx.Interpreter):
    """Runs the graph, and keeps the smallest and largest value of each float tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            low, high = (float(value) for value in result.aminmax())
            before = self.found.get(n, (low, high))
            self.found[n] = min(low, before[0]), max(high, before[1])
        return result


class Quantizers:
    """Adds a quantizer after each operator that shall run in integers."""

    def __init__(
        self,
        graph: fx.Graph,
        layers: set[fx.Node],
        ranges: Mapping[fx.Node, tuple[float, float]],
    ) -> None:
        self.graph, self.layers, self.ranges = graph, layers, ranges
        self.integer: dict[fx.Node, fx.Node] = {}  # each operator, and one of those on its grid

    def add(self) -> None:
        for node in self.graph.nodes:
            if node in self.layers or self._is_integer(node):
                self.integer[node] = node
        for node in self.integer:
            if node.target in _MOVES:
                for source in self._inputs(node):
                    self.integer[self._root(source)] = self._root(node)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.integer:
            groups.setdefault(self._root(node), []).append(node)
        for members in groups.values():
            grid = self._grid(members)
            for node in members:
                if not self._is_fused(node):
                    self._quantize(node, grid)

    def _is_integer(self, node: fx.Node) -> bool:
        if node.target not in _CLIPS | _MOVES | _ARITHMETIC or node not in self.ranges:
            return False
        if not all(map(math.isfinite, self.ranges[node])):  # as of a pad before max-pooling
            return False
        inputs = self._inputs(node)
        if node.target is aten.add.Tensor and len(inputs) != 2:
            return False
        if node.target is aten.pad.default and any(node.args[2:4]) and node.args[2] != "constant":
            return False
        return bool(inputs) and all(source in self.integer for source in inputs)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.ranges]

    def _root(self, node: fx.Node) -> fx.Node:
        while self.integer[node] is not node:
            node = self.integer[node]
        return node

    def _is_fused(self, node: fx.Node) -> bool:
        """True if the runtime computes the operator and a clip after it in one."""
        users = list(node.users)
        return (
            node.target in LAYERS | {aten.add.Tensor}
            and len(users) == 1
            and users[0].target in _CLIPS
            and users[0] in self.integer
        )

    def _grid(self, members: list[fx.Node]) -> Grid:
        """Return the widest trained grid of the layers that read the values, or one over them.

        A value has one grid: LiteRT's converter fails at two in a row.
        """
        readers = [user for node in members for user in node.users]
        arguments: list[Any] = [reader.args for reader in readers if reader.target is QUANTIZE]
        trained = [Grid(*each[1:3]) for each in arguments]
        if trained:
            return max(trained)
        lows, highs = zip(*(self.ranges[node] for node in members), strict=True)
        return Grid.over(min(lows), max(highs))

    def _quantize(self, node: fx.Node, grid: Grid) -> None:
        """Add the quantizer, in place of those of layers that read the value."""
        readers = list(node.users)
        with self.graph.inserting_after(node):
            code = self.graph.call_function(QUANTIZE, (node, *grid.arguments))
        for reader in readers:
            if reader.target is QUANTIZE:
                for dequantize in list(reader.users):
                    dequantize.args = (code, *grid.arguments)
                self.graph.erase_node(reader)
                continue
            # One for each reader: ExecuTorch's partitions may not share nodes.
            with self.graph.inserting_before(reader):
                value = self.graph.call_function(DEQUANTIZE, (code, *grid.arguments))
            reader.replace_input_with(node, value)
