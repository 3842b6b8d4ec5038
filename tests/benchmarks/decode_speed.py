"""Decoding speed of exported files and of memory copies, on one thread.

    python tests/benchmarks/decode_speed.py [--json]

`tensor` decodes one tensor of 512 x 512 x 3 x 3, `file` a file of ResNet-18's size. A file's time
includes reading it (from the page cache) and its SHA-256. Each figure is the best of nine repeats,
in GB of float32 output per second of processor time. Takes less than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from ddqcli.artifact import decoder
from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.tensors import QuantizedTensor

LARGEST = (512, 512, 3, 3)
RESNET18 = (
    [(64, 3, 7, 7)]
    + [(64, 64, 3, 3)] * 4
    + [(128, 64, 3, 3), (128, 64, 1, 1)]
    + [(128, 128, 3, 3)] * 3
    + [(256, 128, 3, 3), (256, 128, 1, 1)]
    + [(256, 256, 3, 3)] * 3
    + [(512, 256, 3, 3), (512, 256, 1, 1)]
    + [LARGEST] * 3
    + [(1000, 512)]
)


def best_seconds(work: Callable[[], object], repeats: int = 9) -> float:
    """Return the processor seconds of the fastest of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.thread_time()  # unlike wall time, excludes waiting for other processes
        work()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def random_tensors(
    shapes: list[tuple[int, ...]], bits: int, axis: int | None
) -> list[QuantizedTensor]:
    """Return a tensor of random levels and indices for each shape; `axis` None: per layer."""
    random = np.random.default_rng(0)
    tensors = []
    for number, shape in enumerate(shapes):
        groups = 1 if axis is None else shape[axis]
        levels = tuple(
            np.sort(random.choice(256, 2**bits, replace=False)).astype(np.uint8)
            for _ in range(groups)
        )
        scale, zero_point = np.full(groups, 2.0**-7, np.float32), np.full(groups, 128, np.uint8)
        indices = random.integers(0, 2**bits, int(np.prod(shape)), dtype=np.uint8)
        name = f"{number}.weight"
        tensors.append(QuantizedTensor(name, shape, axis, indices, levels, scale, zero_point))
    return tensors


def measure(
    what: str, shapes: list[tuple[int, ...]], bits: int, axis: int | None, folder: Path
) -> dict[str, object]:
    """Return one row of the table."""
    path = folder / "model.ddq"
    path.write_bytes(encode_artifact(random_tensors(shapes, bits, axis), [], {}, {}, {})[0])
    stored, *_ = decoder.read(path)
    decoded = [decoder.dequantize(tensor) for tensor in stored.values()]
    pairs = [(np.zeros_like(array), array) for array in decoded]
    nbytes = sum(array.nbytes for array in decoded)
    copy = best_seconds(lambda: [np.copyto(target, array) for target, array in pairs])
    fresh = best_seconds(lambda: [array.copy() for array in decoded])
    if what == "file":
        decode = best_seconds(lambda: decoder.decode(path))
    else:
        decode = best_seconds(lambda: [decoder.dequantize(t) for t in stored.values()])
    return {
        "what": what,
        "levels": "layer" if axis is None else "channel",
        "bits": bits,
        "gb_per_s": round(nbytes / decode / 1e9, 2),
        "copyto_gb_per_s": round(nbytes / copy / 1e9, 2),
        "copy_to_new_memory_gb_per_s": round(nbytes / fresh / 1e9, 2),
        "ratio_to_copyto": round(copy / decode, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(what, shapes, bits, axis, Path(folder))
            for what, shapes in (("tensor", [LARGEST]), ("file", RESNET18))
            for axis in (None, 0)
            for bits in (8, 7, 6, 5, 4, 3, 2, 1)
        ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        "what    levels   bits   decode   copyto   copy to new memory   decode / copyto"
        "     (GB/s of float32, 1 thread)"
    )
    for row in rows:
        what, levels, bits, decode, copy, fresh, ratio = row.values()
        print(f"{what:7} {levels:8} {bits:4} {decode:8.2f} {copy:8.2f} {fresh:20.2f} {ratio:17.2f}")


if __name__ == "__main__":
    main()
