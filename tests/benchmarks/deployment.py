"""Size, latency and check of every runtime for one network: the README's deployment table.

    python tests/benchmarks/deployment.py [--network mobilenet_v2] [--bits 4] [--runs 30]
        [--only LiteRT]

Weights are random and quantized to W4/A8; batch 1, one thread. Latency stands beside the float
network's in the same runtime: the best of runs that alternate, and the median ratio of pairs. C is
compiled by the system's compiler with -O3 and runs the convolutions and linear layers one after
another, on random codes. Runtimes that are not installed are left out. Takes a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from onnx_latency import NETWORKS, float_onnx, network, session, time_alternating
from quantized_net import Quantized, quantize
from torch import nn

import ddqcli
from ddqcli.artifact.decoder import decode
from ddqcli.artifact.read import read_artifact
from ddqcli.c_header.header import header_text, symbols_of
from ddqcli.c_header.verify import compiler, require_same_header
from ddqcli.onnx.export import make_onnx
from ddqcli.pt2e.executorch import EXECUTORCH
from ddqcli.pt2e.graph import make_int8, one_by_one
from ddqcli.pt2e.litert import LITERT
from ddqcli.pt2e.quiet import quiet
from ddqcli.pt2e.runtime import Int8Runtime
from ddqcli.qat.frozen import FrozenModel

Row = tuple[str, str, str, str]  # runtime, bytes, latency, check


def alternating(first: Callable[[], object], second: Callable[[], object], runs: int) -> str:
    """Return the best milliseconds of both, and the median of their ratios."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 3):
        for work, of_work in zip((first, second), times, strict=True):
            start = time.perf_counter()
            work()
            if number >= 3:  # the first runs warm up
                of_work.append(1e3 * (time.perf_counter() - start))
    return in_words(times)


def in_words(times: Sequence[Sequence[float]]) -> str:
    """Return the best milliseconds of float and quantized, and the median of their ratios."""
    best = " -> ".join(f"{min(of_work):.2f} ms" for of_work in times)
    ratio = statistics.median(after / before for before, after in zip(*times, strict=True))
    return f"{best}, {ratio:.2f} times"


def torch_rows(made: Quantized, model: nn.Module, x: torch.Tensor, runs: int) -> list[Row]:
    loaded = ddqcli.load(made.path, network(model_name(model))[0])
    with torch.no_grad():
        same = torch.equal(loaded(x), made.model(x))
        latency = alternating(lambda: model(x[:1]), lambda: loaded(x[:1]), runs)
    check = "same output bits as the network that was saved" if same else "OUTPUTS DIFFER"
    return [("PyTorch", f"{made.path.stat().st_size:,}", latency, check)]


def model_name(model: nn.Module) -> str:
    return str(model.__dict__["benchmark_name"])


def numpy_rows(made: Quantized, _model: nn.Module, _x: torch.Tensor, runs: int) -> list[Row]:
    tensors = decode(made.path)[0]
    start = time.perf_counter()
    for _ in range(runs):
        decode(made.path)
    seconds = (time.perf_counter() - start) / runs
    weights = all((tensors[n] == t.dequantize()).all() for n, t in made.weights.items())
    check = "weights equal bit for bit" if weights else "WEIGHTS DIFFER"
    return [("numpy", f"{made.path.stat().st_size:,}", f"decodes in {1e3 * seconds:.1f} ms", check)]


def onnx_rows(made: Quantized, model: nn.Module, x: torch.Tensor, runs: int) -> list[Row]:
    folder = made.path.parent
    loaded = ddqcli.load(made.path, network(model_name(model))[0])
    float_onnx(model, x[:2], folder / "float.onnx")
    (folder / "ddq.onnx").write_bytes(make_onnx(loaded, made.weights, x, {}).raw)
    for_openvino = make_onnx(loaded, made.weights, x, {}, "openvino").raw
    (folder / "openvino.onnx").write_bytes(for_openvino)
    sample, size = x[:1].numpy(), f"{(folder / 'ddq.onnx').stat().st_size:,}"
    sessions = [session(folder / name, 1) for name in ("float.onnx", "ddq.onnx")]
    pairs = [[wall for wall, _ in times] for times in time_alternating(sessions, sample, runs)]
    latency = in_words(pairs)
    with torch.no_grad():
        expected = loaded(x[:1]).numpy()
    scale = abs(expected).max()

    def check(found: object) -> str:
        return f"outputs within {abs(found - expected).max() / scale:.1e} of torch's"

    name = sessions[1].get_inputs()[0].name
    rows: list[Row] = [
        ("onnxruntime", size, latency, check(sessions[1].run(None, {name: sample})[0]))
    ]
    if importlib.util.find_spec("openvino"):
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": 1}
        compiled = [
            core.compile_model(str(folder / n), "CPU", options)
            for n in ("float.onnx", "openvino.onnx")
        ]
        size = f"{len(for_openvino):,}"
        latency = alternating(lambda: compiled[0](sample), lambda: compiled[1](sample), runs)
        rows.append(("OpenVINO", size, latency, check(compiled[1](sample)[0])))
    return rows


def coreml_rows(made: Quantized, model: nn.Module, x: torch.Tensor, _runs: int) -> list[Row]:
    from ddqcli.coreml.package import make_package
    from ddqcli.coreml.readback import require_same_palettes

    loaded = ddqcli.load(made.path, network(model_name(model))[0])
    package, palettes = make_package(loaded, made.weights, x, {}, half=False)
    path = made.path.parent / "m.mlpackage"
    package.save(str(path))
    require_same_palettes(path, palettes, {}, path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    check = f"{len(palettes)} tables and their indices read back bit for bit; not run (needs a Mac)"
    return [("Core ML", f"{size:,}", "", check)]


def int8_rows(
    runtime: Int8Runtime, made: Quantized, model: nn.Module, x: torch.Tensor, runs: int
) -> list[Row]:
    loaded = ddqcli.load(made.path, network(model_name(model))[0])
    samples = one_by_one(x, runtime.name)
    graph = make_int8(loaded, made.weights, samples, runtime.name)
    paths = [made.path.parent / f"{name}.{runtime.file_format}" for name in ("float", "ddq")]
    for path, raw in zip(
        paths, (float_file(runtime, model, x), runtime.convert(graph)), strict=True
    ):
        path.write_bytes(raw)
    answers = [runtime.open(path) for path in paths]
    sample = [samples[0][0].numpy()]
    latency = alternating(lambda: answers[0](sample), lambda: answers[1](sample), runs)
    missing = runtime.missing(paths[1].read_bytes(), graph.weights)
    (found,), (step,) = answers[1](sample), graph.steps
    with torch.no_grad():
        steps = abs(found - graph.module(*samples[0])[0].numpy()).max() / (step or 1)
        expected = loaded(x[:1]).numpy()
    error = abs(found - expected).max() / abs(expected).max()
    integers = f"WEIGHTS LACK: {missing}" if missing else "integers read back bit for bit"
    check = f"{integers}, outputs {steps:.0f} steps from the graph's, {error:.1e} from torch's"
    return [(runtime.name, f"{paths[1].stat().st_size:,}", latency, check)]


def float_file(runtime: Int8Runtime, model: nn.Module, x: torch.Tensor) -> bytes:
    """Return the float network as a file of the runtime."""
    with quiet():
        if runtime is LITERT:
            import litert_torch

            return litert_torch.convert(model, (x[:1],))._exporter.to_bytes()
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(model, (x[:1],))
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return bytes(edge.to_executorch().buffer)


def c_rows(made: Quantized, model: nn.Module, x: torch.Tensor, _runs: int) -> list[Row]:
    if not compiler():
        return []
    artifact = read_artifact(made.path)
    frozen = FrozenModel(
        quantized=list(artifact.quantized.values()),
        activations=list(artifact.activations.values()),
        floats=artifact.floats,
        aliases=artifact.aliases,
        trained={name: tensor.dequantize() for name, tensor in artifact.quantized.items()},
        constants=artifact.constants,
    )
    text, rows = header_text(frozen, "benchmark")
    require_same_header(text, frozen, made.path)
    folder = made.path.parent
    (folder / "model.h").write_text(text)
    (folder / "main.c").write_text(program(model, x, symbols_of(frozen)))
    command = [str(compiler()), "-std=c99", "-O3", "-o", "main", "main.c", "-lm"]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run([folder / "main"], capture_output=True, text=True, check=True)
    flash = sum(row.bytes for row in rows)
    latency = f"{float(done.stdout):.0f} ms (plain loops)"
    return [("C99", f"{flash:,} of flash", latency, "constants decode bit for bit")]


def program(model: nn.Module, x: torch.Tensor, symbols: dict[str, str]) -> str:
    """Return a program that runs each layer once and prints the milliseconds of all of them."""
    calls: list[str] = []
    most = [1, 1, 1]  # values of an input, a row, an output

    def call(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            weight = f"&{symbols[f'{name}.weight']}"
            sizes = args[0].numel(), module.weight[0].numel(), out.numel()
            most[:] = map(max, most, sizes)
            if isinstance(module, nn.Linear):
                calls.append(f"ddq_linear({weight}, x, 128, row, y);")
                return
            shape = (*args[0].shape[1:], *module.kernel_size, module.stride[0], module.padding[0])
            shape = (*shape, module.dilation[0], module.groups)
            geometry = f"{{{', '.join(map(str, shape))}}}"
            calls.append(
                f"{{ ddq_conv c = {geometry}; ddq_conv2d({weight}, &c, x, 128, row, y); }}"
            )

        return hook

    hooks = [
        module.register_forward_hook(call(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()
    body = "\n    ".join(calls)
    return (
        '#include "model.h"\n#include <stdio.h>\n#include <time.h>\n'
        f"static uint8_t x[{most[0]}];\nstatic int16_t row[{most[1]}];\n"
        f"static int32_t y[{most[2]}];\n"
        "int main(void)\n{\n"
        "    for (uint32_t i = 0; i < sizeof x; i++) x[i] = (uint8_t)(i * 2654435761u >> 24);\n"
        f"    clock_t start = clock();\n    {body}\n"
        '    printf("%f\\n", 1e3 * (double)(clock() - start) / CLOCKS_PER_SEC);\n'
        "    return y[0] == 123456789;\n}\n"
    )


RUNTIMES: list[tuple[str, str | None, Callable[..., list[Row]]]] = [  # name, package, work
    ("PyTorch", None, torch_rows),
    ("numpy", None, numpy_rows),
    ("ONNX", "onnxruntime", onnx_rows),
    ("LiteRT", "litert_torch", partial(int8_rows, LITERT)),
    ("ExecuTorch", "executorch", partial(int8_rows, EXECUTORCH)),
    ("CoreML", "coremltools", coreml_rows),
    ("C99", None, c_rows),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v2")
    parser.add_argument("--only", nargs="*", choices=[name for name, *_ in RUNTIMES])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, x = network(options.network)
    model.__dict__["benchmark_name"] = options.network
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        made = quantize(model, x, path, bits=options.bits, act_bits=options.act_bits or None)
        rows = [
            row
            for name, package, work in RUNTIMES
            if not options.only or name in options.only
            if package is None or importlib.util.find_spec(package)
            for row in work(made, model, x, options.runs)
        ]
    floats = 4 * sum(value.numel() for value in model.state_dict().values())
    print(f"{options.network} W{options.bits}/A{options.act_bits}, float {floats:,} bytes\n")
    print("| runtime | bytes | float -> quantized | check |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
