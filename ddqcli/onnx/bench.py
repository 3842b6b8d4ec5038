"""Latency of two ONNX files, paired in one process, and the time of each layer in onnxruntime."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray

from ddqcli.onnx.export import Runtime
from ddqcli.onnx.openvino import openvino_answers
from ddqcli.onnx.runtime import Answers, onnxruntime_answers, session

Sample = Mapping[str, NDArray[Any]]  # inputs by name, each [1, ...]
RUNS = 30  # timed, after a few to warm up
_WARM_UP = 3
_END = "#"  # ends the layer in the name of a node


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer in both networks, with the nodes that prepare its input."""

    name: str
    float_ms: float
    quantized_ms: float


@dataclass(frozen=True)
class Bench:
    """Milliseconds a sample, float beside quantized, each the median of alternating runs."""

    runtime: Runtime
    threads: int
    runs: int
    float_ms: float
    quantized_ms: float
    speedup: float  # median of float / quantized over the pairs of runs
    layers: tuple[LayerTime, ...]  # of onnxruntime: slower than in float, the slowest first


def bench(float_file: bytes, quantized_file: bytes, sample: Sample) -> Bench:
    """Time both files on one sample in onnxruntime, with torch's number of threads."""
    files = float_file, quantized_file
    answers = tuple(onnxruntime_answers(raw, optimized=True) for raw in files)
    before, after = (layer_times(raw, sample) for raw in files)
    slower = [
        LayerTime(layer, before.get(layer, 0.0), after[layer])
        for layer in after
        if layer and after[layer] > before.get(layer, 0.0)
    ]
    slower.sort(key=lambda layer: layer.float_ms - layer.quantized_ms)
    return _timed("onnxruntime", answers, sample, tuple(slower))


def bench_openvino(float_file: bytes, quantized_file: bytes, sample: Sample) -> Bench:
    """Time both files on one sample in OpenVINO, as it runs them by default."""
    files = float_file, quantized_file
    answers = tuple(openvino_answers(raw, exact=False) for raw in files)
    return _timed("openvino", answers, sample, ())


def _timed(
    runtime: Runtime, both: tuple[Answers, ...], sample: Sample, layers: tuple[LayerTime, ...]
) -> Bench:
    """Alternate between the float and the quantized network."""
    pairs = []
    for number in range(_WARM_UP + RUNS):
        pair = [_milliseconds(answers, sample) for answers in both]
        if number >= _WARM_UP:
            pairs.append(pair)
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return Bench(
        runtime=runtime,
        threads=torch.get_num_threads(),
        runs=RUNS,
        float_ms=medians[0],
        quantized_ms=medians[1],
        speedup=statistics.median(a / b for a, b in pairs),
        layers=layers,
    )


def layer_times(raw: bytes, sample: Sample) -> dict[str, float]:
    """Return milliseconds by layer, each kernel at its best; under "" what belongs to none.

    Nodes without weights count toward the layer that uses their results. Kernels that onnxruntime
    adds, such as changes of the memory layout, count toward the one that runs next.
    """
    proto = onnx.load_model_from_string(raw)
    _name_after_layers(proto.graph)
    with tempfile.TemporaryDirectory() as folder:
        raw = proto.SerializeToString()
        profiled = session(raw, optimized=True, profile=Path(folder) / "profile")
        for _ in range(_WARM_UP + RUNS // 3):
            profiled.run(None, {value.name: sample[value.name] for value in profiled.get_inputs()})
        events = json.loads(Path(profiled.end_profiling()).read_text())
    kernels: dict[str, list[float]] = {}  # in the order of running
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels.setdefault(event["name"], []).append(event["dur"] / 1e3)
    times: defaultdict[str, float] = defaultdict(float)
    waiting = 0.0
    for kernel, milliseconds in kernels.items():
        waiting += min(milliseconds)
        if _END in kernel:
            times[kernel.partition(_END)[0]] += waiting
            waiting = 0.0
    times[""] += waiting
    return dict(times)


def _name_after_layers(graph: onnx.GraphProto) -> None:
    """Begin the names of nodes and their outputs with their layer, as onnxruntime reports them."""
    layers = _layers(graph)
    fixed = {value.name for value in graph.output}
    renamed = {
        name: f"{layers[name]}{_END}{name}"
        for node in graph.node
        for name in node.output
        if name not in fixed
    }
    for node in graph.node:
        node.name = f"{layers[node.output[0]]}{_END}{node.output[0]}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def _layers(graph: onnx.GraphProto) -> Mapping[str, str]:
    """Return the layer of each node's outputs: of its weight, or else of the first user."""
    suffix = ".weight"
    owner = {t.name: t.name.partition(suffix)[0] for t in graph.initializer if suffix in t.name}
    constant = {tensor.name for tensor in graph.initializer}
    layers: dict[str, str] = {}
    for node in graph.node:
        weights = [owner[name] for name in node.input if name in owner]
        is_constant = constant.issuperset(node.input)
        for name in node.output if weights else ():
            layers[name] = weights[0]
            if is_constant:
                owner[name] = weights[0]
        constant.update(node.output if is_constant else ())
    first_user: dict[str, str] = {}
    for node in reversed(graph.node):
        users = [first_user[name] for name in node.output if name in first_user]
        layer = layers.get(node.output[0]) or (users[0] if users else "")
        layers.update(dict.fromkeys(node.output, layer))
        first_user.update(dict.fromkeys(node.input, layer))  # of the nodes in order, the first
    return layers


def _milliseconds(answers: Answers, sample: Sample) -> float:
    start = time.perf_counter()
    answers(sample)
    return 1e3 * (time.perf_counter() - start)
