"""Attack the commands with damaged files, kills, signals and odd surroundings; count what falls.

    python tests/benchmarks/siege.py [--trials 2000] [--seed 0] [--kinds damaged,kill] [--log FILE]

Each trial forks a process that runs a command in a copy of a small project. It may end with a
documented exit code and one sentence, within 2 GB and a minute, and must leave every file whole.
The seed and the trial's number decide everything else. With --log, finished trials are kept in a
file and not repeated. A hundred trials take about half a minute on one core.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from attacks import FILE, GOLDEN, KINDS, RUN, SWEEP
from tiny_project import folder_of_images, make_project
from trial import run


def make_target(folder: Path) -> Path:
    """Make a project with a finished run, an exported file, and weights as safetensors."""
    import torch
    from safetensors.torch import save_file

    for module in ("commands.finetune", "commands.export", "inspection.trained_page"):
        importlib.import_module(f"ddqcli.{module}")  # once, and not in each fork
    make_project(folder)
    here = Path.cwd()
    os.chdir(folder)
    try:
        save_file(torch.load("model.pt", weights_only=True), "model.safetensors")
        folder_of_images(Path("images"))
        shutil.copy(Path(__file__).parents[1] / "artifact" / "golden.ddq", GOLDEN)
        formats = ["c -o model.h", *(["onnx -o model.onnx"] if has_onnx() else [])]
        for command in (
            f"finetune --target-bits 6,4 --run-dir {SWEEP} --max-steps 0 -q",
            f"finetune --run-dir {RUN} -q",
            f"export -o {FILE}",
            *(f"export --format {text}" for text in formats),
        ):
            outcome = run(command)
            assert outcome.code == 0, outcome.err
    finally:
        os.chdir(here)
    return folder


def has_onnx() -> bool:
    return all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


def siege(
    folder: Path, kinds: list[str], trials: int, seed: int, finished: Counter[str]
) -> list[tuple[str, int, str]]:
    """Return (kind, number, fault or "") of trials of each kind that are not `finished`."""
    results = []
    here = Path.cwd()
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        if number // len(kinds) < finished[kind]:
            continue
        work = folder.parent / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        os.chdir(work)
        try:
            fault = KINDS[kind](random.Random(f"{seed} {kind} {number // len(kinds)}"))
        finally:
            os.chdir(here)
        results.append((kind, number // len(kinds), fault))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_STATE_HOME"] = f"{name}/state"
        target = make_target(Path(name) / "project")
        counts: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        if options.log and options.log.exists():
            for line in options.log.read_text().splitlines():
                entry = json.loads(line)
                counts[entry["kind"]] += 1
                faults[entry["kind"]] += bool(entry["fault"])
        for end in range(len(kinds), options.trials + len(kinds), len(kinds)):
            for kind, number, fault in siege(target, kinds, end, options.seed, counts):
                counts[kind] += 1
                faults[kind] += bool(fault)
                if fault:
                    print(f"{kind} {number}: {fault}", flush=True)
                if options.log:
                    with options.log.open("a") as log:
                        log.write(f"{json.dumps({'kind': kind, 'n': number, 'fault': fault})}\n")
        print(f"{'kind':14}{'trials':>8}{'failures':>10}")
        for kind in kinds:
            print(f"{kind:14}{counts[kind]:8,}{faults[kind]:10,}")


if __name__ == "__main__":
    main()
