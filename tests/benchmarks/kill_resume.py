"""Twenty kills at random moments of the quickstart, each followed by `ddq finetune --resume`: the same bytes as without.

    python tests/benchmarks/kill_resume.py [--kills 20] [--seed 0] [--save-every 5]

Each process is killed (SIGKILL) at a moment drawn evenly from the time that the undisturbed run took, start-up included;
where a run reaches its end, its file is compared and the next run begins. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
FILES = ("model.py", "model.pt", "digits.npz", "ddq.yaml")


def ddq(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ddqcli", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(*args: str) -> None:
    """Run a command to its end; its complaint is ours."""
    process = ddq(*args)
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"ddq {' '.join(args)} ended with {process.returncode}: {said.decode()}")


def artifact(run: str) -> bytes:
    finish("export", run)
    return (Path(run) / "model.safetensors").read_bytes()


def where(run: str) -> str:
    """How far a run had come when it was killed."""
    files = {path.name for path in Path(run).glob("*")}
    stages = (
        ("report.json", "after its end"),
        ("final.pt", "at its end"),
        ("last.pt", "while training"),
    )
    return next((stage for name, stage in stages if name in files), "before the first step")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--save-every", type=int, default=5, help="steps; often, so that many kills hit a write"
    )
    given = options.parse_args()
    os.environ["PYTHONPATH"] = str(QUICKSTART.parents[1])
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    for name in FILES:
        shutil.copy(QUICKSTART / name, folder)
    os.chdir(folder)
    flags = [
        "finetune",
        "model.pt",
        "--target-bits",
        "4",
        "--set",
        f"train.save_every={given.save_every}",
        "-q",
    ]
    finish(*flags, "--run-dir", "first")  # compiles what later processes find compiled
    began = time.monotonic()
    finish(*flags, "--run-dir", "undisturbed")
    span, expected = time.monotonic() - began, artifact("undisturbed")
    if artifact("first") != expected:
        sys.exit(f"two undisturbed runs differ; see {folder}")
    print(f"undisturbed: {span:.1f} s, {len(expected):,} bytes")
    draw, killed, equal, run = random.Random(given.seed), Counter(), 0, 0
    while killed.total() < given.kills:
        run, done = run + 1, False
        while not done:  # the last kills may fall into a run; it is then brought to its end
            process = ddq(*flags, "--run-dir", f"run{run}", "--resume")
            try:
                process.communicate(
                    timeout=draw.uniform(0, span) if killed.total() < given.kills else None
                )
                done = True
                if process.returncode:
                    sys.exit(f"run {run} could not be resumed: exit code {process.returncode}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed[where(f"run{run}")] += 1
                print(f"kill {killed.total()}: run {run}, {where(f'run{run}')}", flush=True)
        if artifact(f"run{run}") != expected:
            sys.exit(f"run {run} ended with other bytes; see {folder}")
        equal += 1
        print(f"run {run}: the same bytes")
    print(
        f"{killed.total()} kills ({', '.join(f'{n} {stage}' for stage, n in killed.items())}), {equal} runs, all the same bytes"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
