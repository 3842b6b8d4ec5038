"""ResNet-20 on CIFAR-10: who wins at equal bytes, and how good the default recipe gets. Final epoch, held-out images.

    PYTHONPATH=. python tests/benchmarks/evidence.py CHECKPOINT FILE.py:FACTORY CIFAR10_FOLDER [--only TEXT ...] [--jobs 2]
    python tests/benchmarks/evidence.py --table [RESULTS]

The first form trains every row (`ddq finetune`) that recipes/evidence/results.jsonl does not hold yet; several side by side have
one thread each, and an interrupted row is resumed. All rows take nine hours on two cores. The second prints the tables
of recipes/evidence/results.jsonl, or of another file like it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/cifar10_resnet20.yaml"
RESULTS = ROOT / "recipes" / "evidence" / "results.jsonl"
SEEDS = (0, 1, 2)

# Every layer at the same bits (at 2 bits, the first and the last have 8), and what such a file weighs: the budget of the others.
ENDS = "overrides=[{match: conv1, bits: 8}, {match: linear, bits: 8}]"
UNIFORM = {
    "4/8": (["--max-bits", "4", "--min-bits", "4"], "145904B"),
    "2/4": (["--max-bits", "2", "--min-bits", "2", "--set", ENDS], "79664B"),
}
# Quantizers are compared with labels alone, and with BatchNorm's statistics from the end of the run.
LABELS_ALONE = ["--set", "train.distill.weight=0", "--set", "train.bn_freeze=1"]
LSQ = ["--set", "weights.levels=uniform", "--set", "activations.levels=uniform"]
GOOD = {
    "4/8": 0.0,
    "4/4": 0.2,
    "3/3": 0.6,
    "2/4": 1.0,
    "2/2": 1.9,
}  # the drop that was aimed at, percent


@dataclass(frozen=True)
class Row:
    """One training run."""

    table: str
    setting: str  # bits of weights / activations
    method: str
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.table} {self.setting} {self.method} seed {self.seed}"


def rows() -> list[Row]:
    """All runs of both tables, in the order in which they are worth having."""
    found = []
    for seed in SEEDS:
        for setting, (uniform, size) in reversed(UNIFORM.items()):
            common = (
                "--epochs",
                "5",
                "--target-size",
                size,
                "--act-bits",
                setting[-1],
                *LABELS_ALONE,
            )
            methods = {
                "gates": [],
                "static allocation": ["--set", "gates.rule=fixed"],
                "uniform bits, learned levels": uniform,
                "uniform bits, LSQ": [*uniform, *LSQ],
            }
            found += [
                Row("equal bytes", setting, m, seed, (*common, *o)) for m, o in methods.items()
            ]
    for setting in reversed(GOOD):
        weights, inputs = setting.split("/")
        options = ("--epochs", "15", "--target-bits", weights, "--act-bits", inputs)
        found.append(Row("default recipe", setting, "as it is", 0, options))
    return found


def train(row: Row, model: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one row; raises CalledProcessError if the command fails."""
    checkpoint, arch, data = model
    options = [*row.options, "--set", "train.precision=bfloat16", "--seed", str(row.seed)]
    named = ["--recipe", RECIPE, "--arch", Path(arch).name, "--data", "CIFAR10_FOLDER"]
    shown = ["ddq", "finetune", Path(checkpoint).name, *named]
    here = ["--recipe", str(ROOT / RECIPE), "--arch", arch, "--data", data]
    command = [sys.executable, "-m", "ddqcli", "finetune", checkpoint, *here]
    run = folder / row.name.replace("/", "-").replace(" ", "_")
    done = subprocess.run(
        [*command, *options, "--run-dir", str(run), "--resume", "--json", "--quiet"],
        env=environment, check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    report = json.loads(done.stdout)["data"]
    bits = {tensor["name"]: tensor["bits"] for tensor in report["layers"]}
    kept = {key: report[key] for key in ("accuracy", "totals", "run")} | {
        "training_loss": training_loss(run)
    }
    name = {"table": row.table, "setting": row.setting, "method": row.method, "seed": row.seed}
    return {
        **name,
        "commit": commit(),
        "command": shlex.join([*shown, *options]),
        **kept,
        "bits": bits,
    }


def training_loss(run: Path) -> float:
    """Mean over the last tenth of the run, in which the bits are frozen."""
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return round(
        statistics.mean(m["loss"] for m in told if "loss" in m and m["step"] > 0.9 * m["steps"]), 5
    )


def commit() -> str:
    """Of which code a result tells."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        asked, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def print_tables(found: list[dict[str, Any]]) -> None:
    for setting in UNIFORM:
        print(
            f"\n{setting}, 5 epochs: accuracy in %, mean and spread (s.d.) of the seeds; training losses"
        )
        for method in dict.fromkeys(row.method for row in rows() if row.table == "equal bytes"):
            of = [
                r
                for r in found
                if (r["table"], r["setting"], r["method"]) == ("equal bytes", setting, method)
            ]
            accuracy = [r["accuracy"]["quantized"] for r in of]
            if accuracy:
                spread = f"{statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "-"
                size = max(r["totals"]["bytes"] for r in of)
                each = " ".join(f"{a:.2f}" for a in accuracy)
                loss = " ".join(
                    f"{r['training_loss']:.4f}" if "training_loss" in r else "-" for r in of
                )
                print(
                    f"| {method} | {size:,} | {statistics.mean(accuracy):.2f} | {spread} | {each} | {loss} |"
                )
    print("\ndefault recipe, 15 epochs")
    for r in found:
        if r["table"] == "default recipe":
            accuracy, totals = r["accuracy"], r["totals"]
            size, drop = (
                f"{totals['bytes']:,} | {totals['average_bits']:.3f}",
                f"{accuracy['drop']:.2f}",
            )
            name = f"{r['setting']} | {r['method']} | {r['commit']}"
            print(
                f"| {name} | {size} | {accuracy['quantized']:.2f} | {drop} | {GOOD[r['setting']]} |"
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", nargs="*", metavar="CHECKPOINT FILE.py:FACTORY CIFAR10_FOLDER")
    options.add_argument(
        "--only", nargs="*", default=[], help="rows whose name contains one of these"
    )
    options.add_argument("--jobs", type=int, default=1)
    runs = Path(tempfile.gettempdir()) / f"ddq-evidence-{commit()}"
    options.add_argument("--runs", type=Path, default=runs)
    options.add_argument("--table", nargs="?", type=Path, const=RESULTS, metavar="RESULTS")
    given = options.parse_args()
    if not given.table and len(given.model) != 3:
        options.error("give CHECKPOINT, FILE.py:FACTORY and CIFAR10_FOLDER, or --table")
    if not given.table:
        RESULTS.parent.mkdir(exist_ok=True)
        done = {(r["table"], r["setting"], r["method"], r["seed"]) for r in results(RESULTS)}
        missing = [r for r in rows() if (r.table, r.setting, r.method, r.seed) not in done]
        wanted = [
            r for r in missing if not given.only or any(text in r.name for text in given.only)
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if given.jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
        lock = threading.Lock()

        def work(row: Row) -> None:
            result = train(row, given.model, given.runs, environment)
            with lock, RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{row.name}: {result['accuracy']['quantized']:.2f} %", flush=True)

        with ThreadPoolExecutor(given.jobs) as pool:
            for _ in pool.map(work, wanted):
                pass
    print_tables(results(given.table or RESULTS))


if __name__ == "__main__":
    main()
