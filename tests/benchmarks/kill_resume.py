"""Kill the quickstart's training at random moments, resume it, and compare the exported bytes.

    python tests/benchmarks/kill_resume.py [--kills 20] [--seed 0] [--save-every 5]

An uninterrupted run sets the expected file and the time span. Each following process gets SIGKILL
at a uniformly random moment of that span, start-up included, and `ddq finetune --resume` continues
it. Every run that ends must export the expected bytes. Takes about five minutes on two cores.
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


def start_ddq(*args: str) -> subprocess.Popen[bytes]:
    """Start a ddq command; stderr is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "ddqcli", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(*args: str) -> None:
    """Run a ddq command; exit with its message if it fails."""
    process = start_ddq(*args)
    _, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"ddq {' '.join(args)} ended with {process.returncode}: {stderr.decode()}")


def exported_bytes(run: str) -> bytes:
    """Return the content of a run's exported file."""
    finish("export", run)
    return (Path(run) / "model.safetensors").read_bytes()


def stage(run: str) -> str:
    """Return the stage a killed run had reached, judged by its files."""
    files = {path.name for path in Path(run).glob("*")}
    stages = (
        ("report.json", "after its end"),
        ("final.pt", "at its end"),
        ("last.pt", "while training"),
    )
    return next((text for name, text in stages if name in files), "before the first step")


def run_with_kills(
    run: str, flags: list[str], span: float, kills: int, draw: random.Random
) -> Counter[str]:
    """Bring a run to its end through at most `kills` kills; return their number by stage."""
    killed: Counter[str] = Counter()
    while True:
        process = start_ddq(*flags, "--run-dir", run, "--resume")
        try:
            left = killed.total() < kills
            process.communicate(timeout=draw.uniform(0, span) if left else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed[stage(run)] += 1
            print(f"{run}: killed {stage(run)}", flush=True)
            continue
        if process.returncode:
            sys.exit(f"{run} could not be resumed: exit code {process.returncode}")
        return killed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=int, default=5, help="steps; a small number lets kills hit writes"
    )
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(QUICKSTART.parents[1])
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    for name in FILES:
        shutil.copy(QUICKSTART / name, folder)
    os.chdir(folder)
    flags = ["finetune", "model.pt", "--target-bits", "4", "-q"]
    flags += ["--set", f"train.save_every={args.save_every}"]
    finish(*flags, "--run-dir", "first")  # fills the compile cache, which would shorten the span
    began = time.monotonic()
    finish(*flags, "--run-dir", "uninterrupted")
    span, expected = time.monotonic() - began, exported_bytes("uninterrupted")
    if exported_bytes("first") != expected:
        sys.exit(f"two uninterrupted runs differ; see {folder}")
    print(f"uninterrupted: {span:.1f} s, {len(expected):,} bytes")
    draw, killed, runs = random.Random(args.seed), Counter[str](), 0
    while killed.total() < args.kills:
        runs += 1
        run = f"run{runs}"
        killed += run_with_kills(run, flags, span, args.kills - killed.total(), draw)
        if exported_bytes(run) != expected:
            sys.exit(f"{run} ended with other bytes; see {folder}")
        print(f"{run}: the same bytes", flush=True)
    stages = ", ".join(f"{count} {text}" for text, count in killed.items())
    print(f"{killed.total()} kills ({stages}), {runs} runs, all the same bytes")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
