"""Run exported ONNX files in onnxruntime-web (wasm, in node) and compare with onnxruntime.

    npm install --prefix FOLDER onnxruntime-web
    python tests/benchmarks/onnx_web.py FOLDER [--only NAME ...] [--bits 2 3 4 8] [--act-bits 8]

The networks and files are those of onnx_latency.py; batch 1, one thread. `opening` is the time to
create a session, `latency` the median of ten runs. Takes a minute a network.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from onnx_latency import NETWORKS, network
from quantized_net import quantize

import ddqcli
from ddqcli.onnx.export import make_onnx
from ddqcli.onnx.runtime import onnxruntime_answers

PROGRAM = """
import * as ort from "onnxruntime-web";
import fs from "node:fs";
const [model, input, output, ...shape] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
const data = new Float32Array(fs.readFileSync(input).buffer.slice(0));
const begin = performance.now();
const session = await ort.InferenceSession.create(
  fs.readFileSync(model), { executionProviders: ["wasm"] });
const opening = performance.now() - begin;
const feed = { [session.inputNames[0]]: new ort.Tensor("float32", data, shape.map(Number)) };
const times = [];
let answer;
for (let run = 0; run < 12; run++) {
  const start = performance.now();
  answer = (await session.run(feed))[session.outputNames[0]];
  if (run > 1) times.push(performance.now() - start);
}
fs.writeFileSync(output, Buffer.from(answer.data.buffer));
times.sort((a, b) => a - b);
console.log(JSON.stringify({ opening, latency: times[times.length >> 1] }));
"""


def in_the_web(installed: Path, model: Path, x: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Return the output of a file in onnxruntime-web, and its times in milliseconds."""
    program = installed / "run.mjs"  # beside node_modules, where imports are looked for
    program.write_text(PROGRAM)
    given, answer = model.with_suffix(".input"), model.with_suffix(".output")
    given.write_bytes(x.tobytes())
    command = [shutil.which("node") or "node", program, model, given, answer, *map(str, x.shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"node failed: {done.stderr.strip()}")
    return np.frombuffer(answer.read_bytes(), np.float32), json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where npm installed onnxruntime-web")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--act-bits", type=int, default=8, help="0: weights alone")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    worst = 0.0
    for name in options.only:
        model, x = network(name)
        for bits in options.bits:
            with tempfile.TemporaryDirectory() as folder:
                made = quantize(
                    model,
                    x,
                    Path(folder) / "model.safetensors",
                    bits=bits,
                    act_bits=options.act_bits or None,
                )
                loaded = ddqcli.load(made.path, network(name)[0])
                path = Path(folder) / "model.onnx"
                path.write_bytes(make_onnx(loaded, made.weights, x, {}).raw)
                sample = x[:1].numpy()
                found, times = in_the_web(options.folder.resolve(), path, sample)
                (ours,) = onnxruntime_answers(path, optimized=True)({"input": sample})
                away = float(abs(found - ours.reshape(-1)).max() / abs(ours).max())
                worst = max(worst, away)
                print(
                    f"{name} W{bits}/A{options.act_bits}: {path.stat().st_size:,} bytes, opening "
                    f"{times['opening']:.0f} ms, latency {times['latency']:.1f} ms, outputs within "
                    f"{away:.1e} of onnxruntime's",
                    flush=True,
                )
    if worst > 0.05:
        raise SystemExit("outputs differ")


if __name__ == "__main__":
    main()
