"""CPU latency in onnxruntime: the float network against `ddq export --format onnx` at W4/A8.

    python tests/benchmarks/onnx_latency.py [--only NAME ...] [--threads 1] [--runs 30] [--json]

torchvision's ResNet-18 and MobileNetV2 at 224 x 224, batch 1. Latency does not depend on the values
of the weights, so they are random. The two networks alternate within one process. `best` and
`median` are wall time; `cpu` is the calling thread's processor time, which other processes disturb
less (for one thread only). Takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
import torch
from quantized_net import quantize, shake
from torch import nn
from torchvision import models as zoo

import ddqcli
from ddqcli.onnx.export import make_onnx

NETWORKS = ("resnet18", "mobilenet_v2")


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


def measure(name: str, folder: Path, threads: list[int], runs: int) -> list[dict[str, object]]:
    """Return one row for each number of threads."""
    torch.manual_seed(0)
    model, x = shake(zoo.get_model(name, weights=None)), torch.randn(4, 3, 224, 224)
    plain, ddq = folder / f"{name}.float.onnx", folder / f"{name}.ddq.onnx"
    float_onnx(model, x[:2], plain)
    quantized = quantize(model, x, folder / f"{name}.safetensors")
    ddq.write_bytes(make_onnx(ddqcli.load(quantized.path, model), quantized.weights, x, {}).raw)
    rows: list[dict[str, object]] = []
    for count in threads:
        sessions = [session(path, count) for path in (plain, ddq)]
        times = time_alternating(sessions, x[:1].numpy(), runs)
        best = [min(wall for wall, _ in each) for each in times]
        median = [statistics.median(wall for wall, _ in each) for each in times]
        cpu = [min(used for _, used in each) for each in times]
        row: dict[str, object] = {"network": name, "threads": count}
        for what, (before, after) in (("best", best), ("median", median), ("cpu", cpu)):
            if what != "cpu" or count == 1:
                row |= {f"{what}_float_ms": round(before, 2), f"{what}_ddq_ms": round(after, 2)}
                row |= {f"{what}_ratio": round(before / after, 2)}
        row |= {"float_bytes": plain.stat().st_size, "ddq_bytes": ddq.stat().st_size}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="numbers of threads to measure"
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name in arguments.only
            for row in measure(name, Path(folder), arguments.threads, arguments.runs)
        ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"onnxruntime {onnxruntime.__version__}, milliseconds, batch 1")
    for row in rows:
        parts = [
            f"{what} {row[f'{what}_float_ms']} -> {row[f'{what}_ddq_ms']} ({row[f'{what}_ratio']}x)"
            for what in ("best", "median", "cpu")
            if f"{what}_ratio" in row
        ]
        print(f"{row['network']:13} {row['threads']} threads: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
