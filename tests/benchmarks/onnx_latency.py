"""CPU latency in onnxruntime, and file sizes: float against `ddq export --format onnx`.

    python tests/benchmarks/onnx_latency.py [--only NAME ...] [--bits 4] [--act-bits 8]
        [--threads 1] [--runs 30] [--json]

torchvision's ResNet-18 and MobileNetV2 at 224 x 224, and a CIFAR ResNet-20, batch 1. Latency does
not depend on the values of the weights, so they are random. Three files alternate within one
process: float, the ONNX file of ddq, and the same with plain int8 weights in place of packed ones.
`best` and `median` are wall time; `cpu` is the calling thread's processor time, which other
processes disturb less (for one thread only). `session` is the time to open a file, the best of
five. --act-bits 0 leaves the inputs of layers in float. Takes two minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import onnxruntime
import torch
from quantized_net import quantize, shake
from step_time import resnet20
from torch import nn
from torchvision import models as zoo

import ddqcli
from ddqcli.onnx import packed
from ddqcli.onnx.export import make_onnx
from ddqcli.onnx.openvino import openvino_answers
from ddqcli.onnx.runtime import onnxruntime_answers

NETWORKS = ("resnet18", "mobilenet_v2", "resnet20")
FILES = ("float", "plain", "ddq")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network with random weights, and samples for it."""
    torch.manual_seed(0)
    if name == "resnet20":
        return shake(resnet20()), torch.randn(4, 3, 32, 32)
    return shake(zoo.get_model(name, weights=None)), torch.randn(4, 3, 224, 224)


def write_files(name: str, bits: int, act_bits: int | None, folder: Path) -> dict[str, Path]:
    """Write the float network, its ddq file, and its ONNX file with packed and plain weights."""
    model, x = network(name)
    paths = {kind: folder / f"{name}.{kind}.onnx" for kind in FILES}
    paths["safetensors"] = folder / f"{name}.safetensors"
    float_onnx(model, x[:2], paths["float"])
    made = quantize(model, x, paths["safetensors"], bits=bits, act_bits=act_bits)
    loaded = ddqcli.load(made.path, model)
    paths["ddq"].write_bytes(make_onnx(loaded, made.weights, x, {}).raw)
    node_bytes, packed._NODE_BYTES = packed._NODE_BYTES, 1 << 40  # then packing never pays
    paths["plain"].write_bytes(make_onnx(loaded, made.weights, x, {}).raw)
    packed._NODE_BYTES = node_bytes
    return paths


def float_onnx(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Export the float network unmodified; onnxruntime folds BatchNorm and picks fast layouts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (x,),
            path,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            external_data=False,
            verbose=False,
        )


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open an ONNX file in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def time_alternating(
    sessions: list[onnxruntime.InferenceSession], x: np.ndarray, runs: int
) -> list[list[tuple[float, float]]]:
    """Return (wall, processor) milliseconds of each run, for each session."""
    all_times: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for number in range(runs + 3):
        for each, times in zip(sessions, all_times, strict=True):
            wall, cpu = time.perf_counter(), time.thread_time()
            each.run(None, {each.get_inputs()[0].name: x})
            if number >= 3:  # the first runs warm up
                times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - cpu)))
    return all_times


def opening_ms(path: Path, threads: int) -> float:
    """Return the milliseconds to open a file, the best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        session(path, threads)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def measure(paths: dict[str, Path], name: str, threads: int, runs: int) -> dict[str, object]:
    """Return one row of the table."""
    sample = network(name)[1][:1].numpy()
    times = time_alternating([session(paths[kind], threads) for kind in FILES], sample, runs)
    row: dict[str, object] = {"network": name, "threads": threads}
    row |= {f"{kind}_bytes": path.stat().st_size for kind, path in paths.items()}
    for kind, of_kind in zip(FILES, times, strict=True):
        wall, cpu = zip(*of_kind, strict=True)
        row |= {f"{kind}_best_ms": min(wall), f"{kind}_median_ms": statistics.median(wall)}
        row |= {f"{kind}_cpu_ms": min(cpu)} if threads == 1 else {}
        row |= {f"{kind}_session_ms": opening_ms(paths[kind], threads)}
    if importlib.util.find_spec("openvino"):
        feed = {"input": sample}
        (ours,) = onnxruntime_answers(paths["ddq"], optimized=True)(feed)
        (theirs,) = openvino_answers(paths["ddq"])(feed)
        row["openvino_difference"] = float(abs(theirs - ours).max() / abs(ours).max())
    for base in ("float", "plain"):
        pairs = zip(times[FILES.index(base)], times[FILES.index("ddq")], strict=True)
        row[f"ratio_to_{base}"] = statistics.median(a[0] / b[0] for a, b in pairs)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="numbers of threads to measure"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            paths = write_files(name, arguments.bits, arguments.act_bits or None, Path(folder))
            rows += [measure(paths, name, count, arguments.runs) for count in arguments.threads]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"onnxruntime {onnxruntime.__version__}, batch 1")
    for row in rows:
        print(f"{row['network']}, {row['threads']} threads")
        sizes = [f"{kind} {row[f'{kind}_bytes']:,}" for kind in (*FILES, "safetensors")]
        print(f"  bytes: {', '.join(sizes)}")
        for what in ("best", "median", "cpu", "session"):
            if f"float_{what}_ms" in row:
                parts = [f"{kind} {row[f'{kind}_{what}_ms']:.2f}" for kind in FILES]
                print(f"  {what}, ms: {', '.join(parts)}")
        ratios = f"{row['ratio_to_float']:.2f} times float, {row['ratio_to_plain']:.2f} times plain"
        if "openvino_difference" in row:
            print(f"  OpenVINO: outputs within {row['openvino_difference']:.1e} of onnxruntime's")
        print(f"  speed of ddq: {ratios} (median of pairs)")


if __name__ == "__main__":
    main()
