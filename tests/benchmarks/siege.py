"""Attack the commands with damaged files, kills, signals and odd surroundings; count what falls.

    python tests/benchmarks/siege.py [--trials 2000] [--seed 0] [--kinds damaged,kill] [--log FILE]

Each trial forks a process that runs a command in a copy of a small project. It may end with a
documented exit code and one sentence, within 2 GB and a minute (or DDQ_TRIAL_SECONDS), and must
leave every file whole. The seed and the trial's number decide everything else. With --log, finished
trials are kept in a file and not repeated. Trials that tried the same are counted once. A hundred
trials take about half a minute on one core; `attacks.py` says how many of them are of each kind.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forks have no other one

from attacks import FILE, GOLDEN, KINDS, RUN, SWEEP, WRITERS
from tiny_project import folder_of_images, inside, make_project
from trial import run

from ddqcli.cli.app import app

# With WRITERS, commands that import all that most of them do. ONNX would make each fork slower.
FIRST = ("report", "runs", "finetune --data images --max-steps 0 --run-dir runs/more -q")
BY_NAME = {kind.__name__: kind for kind in KINDS}


def make_target(folder: Path) -> Path:
    """Make a project with a finished run, an exported file, and weights as safetensors."""
    import torch
    from safetensors.torch import save_file

    make_project(folder)
    with inside(folder):
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
    return folder


def has_onnx() -> bool:
    return all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


def import_once(folder: Path) -> None:
    """Import what the commands import, and build their parser, here and not in each fork."""
    with inside(shutil.copytree(folder, folder.parent / "imports")):
        for command in (*WRITERS, *FIRST):
            run(command, _note_imports)
        names = Path("imported").read_text().split()
    for name in dict.fromkeys(names):
        with suppress(Exception):  # what is not installed, or the project's own
            importlib.import_module(name)
    typer.main.get_command = lru_cache(typer.main.get_command)
    typer.main.get_command(app)
    assert threading.active_count() == 1, "a fork would lack the other threads"
    gc.collect()
    gc.freeze()


def _note_imports() -> None:
    file = os.open("imported", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "import":
            os.write(file, f"{arguments[0]}\n".encode())

    sys.addaudithook(note)


def siege(
    folder: Path, kinds: dict[str, int], numbers: range, seed: int, finished: Counter[str]
) -> Iterator[tuple[str, int, str, str]]:
    """Yield (kind, its number, what was tried, fault or "") of those trials, but the `finished`.

    `kinds` maps kinds to how many of them follow each other. Each trial has a copy of the project
    `folder` and of the user's state.
    """
    turn = [(kind, k) for kind, count in kinds.items() for k in range(count)]
    state, work = Path(os.environ["XDG_STATE_HOME"]), folder.parent / "work"
    os.environ["XDG_STATE_HOME"] = str(work / "state")
    try:
        for number in numbers:
            kind, k = turn[number % len(turn)]
            count = number // len(turn) * kinds[kind] + k
            if count < finished[kind]:
                continue
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(state, work / "state")
            with inside(shutil.copytree(folder, work / "project")):
                what, fault = BY_NAME[kind](random.Random(f"{seed} {kind} {count}"))
            yield kind, count, what, fault
    finally:
        os.environ["XDG_STATE_HOME"] = str(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(BY_NAME))
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    kinds = {name: KINDS[BY_NAME[name]] for name in options.kinds.split(",")}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        os.environ["XDG_STATE_HOME"] = f"{name}/state"
        target = make_target(Path(name) / "project")
        import_once(target)
        entries = []
        if options.log and options.log.exists():
            entries = [json.loads(line) for line in options.log.read_text().splitlines()]
        finished = Counter(entry["kind"] for entry in entries)
        for kind, n, what, fault in siege(
            target, kinds, range(options.trials), options.seed, finished
        ):
            tried = hashlib.sha256(what.encode()).hexdigest()[:16]
            entries.append({"kind": kind, "n": n, "tried": tried, "fault": fault})
            if fault:
                entries[-1]["what"] = what
                print(f"{kind} {n}: {what}: {fault}", flush=True)
            if options.log:
                with options.log.open("a") as log:
                    log.write(f"{json.dumps(entries[-1])}\n")
    distinct = {(entry["kind"], entry["tried"]): entry["fault"] for entry in entries}
    trials = Counter(kind for kind, _ in distinct)
    failures = Counter(kind for (kind, _), fault in distinct.items() if fault)
    print(f"{'kind':14}{'trials':>8}{'failures':>10}")
    for kind in kinds:
        print(f"{kind:14}{trials[kind]:8,}{failures[kind]:10,}")
    print(f"{'all':14}{trials.total():8,}{failures.total():10,}")


if __name__ == "__main__":
    main()
