"""Train the rows of recipes/evidence: ResNet-20 on CIFAR-10 at equal bytes, and by default.

    python tests/benchmarks/evidence.py CHECKPOINT FILE.py:FACTORY CIFAR10_FOLDER \\
        [--only TEXT ...] [--jobs 2] [--runs FOLDER]
    python tests/benchmarks/evidence.py --table [RESULTS]

The first form runs `ddq finetune` for each row that recipes/evidence/results.jsonl lacks, resumes
interrupted rows, and appends the held-out accuracy after the last epoch. Parallel jobs use one
thread each. All rows take nine hours on two cores. The second form prints the tables of
recipes/evidence/results.jsonl or of another such file.
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

# Uniform bits, and the bytes of their file, which are the budget of the other methods. At 2 bits,
# the first and last layer have 8.
ENDS = "overrides=[{match: conv1, bits: 8}, {match: linear, bits: 8}]"
UNIFORM = {
    "4/8": (["--max-bits", "4", "--min-bits", "4"], "145904B"),
    "2/4": (["--max-bits", "2", "--min-bits", "2", "--set", ENDS], "79664B"),
}
# The comparison trains on labels alone and estimates BatchNorm's statistics at the end of the run.
LABELS_ALONE = ["--set", "train.distill.weight=0", "--set", "train.bn_freeze=1"]
LSQ = ["--set", "weights.levels=uniform", "--set", "activations.levels=uniform"]
SDQ = ["--method", "sdq"]
# Each part of SDQ at 2/4, beside its rows and the gates' in the comparison at equal bytes.
ABLATION = {
    "SDQ, uniform levels, no bin regularization": [
        *SDQ, *LSQ, *LABELS_ALONE, "--set", "train.bin_regularization=0"
    ],
    "SDQ, uniform levels, distilled": [*SDQ, *LSQ],
    "gates, bin regularization": [*LABELS_ALONE, "--set", "train.bin_regularization=0.1"],
    "gates, distilled": [],
}  # fmt: skip
SDQ_GOAL = 0.0  # accuracy drop at SDQ's own setting, 1.93 bits with float inputs; published: 0.3
GOALS = {"4/8": 0.0, "4/4": 0.2, "3/3": 0.6, "2/4": 1.0, "2/2": 1.9}  # accuracy drop, points


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

    @property
    def identity(self) -> dict[str, Any]:
        """Return the fields that identify the row in a results file."""
        return {
            "table": self.table, "setting": self.setting, "method": self.method, "seed": self.seed
        }  # fmt: skip


def all_rows() -> list[Row]:
    """Return the runs of all tables, most valuable first."""
    rows = []
    for seed in SEEDS:
        for setting, (uniform, size) in reversed(UNIFORM.items()):
            budget = ("--epochs", "5", "--target-size", size, "--act-bits", setting[-1])
            methods = {
                "gates": [],
                "static allocation": ["--set", "gates.rule=fixed"],
                "uniform bits, learned levels": uniform,
                "uniform bits, LSQ": [*uniform, *LSQ],
                "SDQ, uniform levels": [*SDQ, *LSQ],
                "SDQ, learned levels": SDQ,
            }
            rows += [
                Row("equal bytes", setting, method, seed, (*budget, *LABELS_ALONE, *options))
                for method, options in methods.items()
            ]
        size = ("--epochs", "5", "--target-size", UNIFORM["2/4"][1], "--act-bits", "4")
        rows += [
            Row("ablation", "2/4", method, seed, (*size, *options))
            for method, options in ABLATION.items()
        ]
    for method, options in {"uniform levels": [*SDQ, *LSQ], "learned levels": SDQ}.items():
        budget = ("--epochs", "15", "--target-bits", "1.93", "--set", "activations.bits=null")
        rows.append(Row("SDQ's setting", "1.93/32", method, 0, (*budget, *options)))
    for setting in reversed(GOALS):
        weights, inputs = setting.split("/")
        options = ("--epochs", "15", "--target-bits", weights, "--act-bits", inputs)
        rows.append(Row("default recipe", setting, "as it is", 0, options))
    return rows


def missing_rows(results: list[dict[str, Any]]) -> list[Row]:
    """Return the rows without a result."""
    return [
        row for row in all_rows() if not any(row.identity.items() <= r.items() for r in results)
    ]


def train(row: Row, model: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Train one row and return its result; raise CalledProcessError if the command fails."""
    checkpoint, arch, data = model
    options = [*row.options, "--set", "train.precision=bfloat16", "--seed", str(row.seed)]
    run = folder / row.name.replace("/", "-").replace(" ", "_")
    process = subprocess.run(
        [
            sys.executable, "-m", "ddqcli", "finetune", checkpoint, "--recipe", str(ROOT / RECIPE),
            "--arch", arch, "--data", data, *options,
            "--run-dir", str(run), "--resume", "--json", "--quiet",
        ],
        env=environment, check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    report = json.loads(process.stdout)["data"]
    portable_command = [
        "ddq", "finetune", Path(checkpoint).name, "--recipe", RECIPE, "--arch", Path(arch).name,
        "--data", "CIFAR10_FOLDER", *options,
    ]  # fmt: skip
    return {
        **row.identity,
        "commit": commit(),
        "command": shlex.join(portable_command),
        **{key: report[key] for key in ("accuracy", "totals", "run")},
        "training_loss": training_loss(run),
        "bits": {tensor["name"]: tensor["bits"] for tensor in report["layers"]},
    }


def training_loss(run: Path) -> float:
    """Return the mean loss of the last tenth of a run, where the bits are frozen."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m and m["step"] > 0.9 * m["steps"]]
    return round(statistics.mean(losses), 5)


def commit() -> str:
    """Return the short hash of the repository's commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    process = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return process.stdout.strip()


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def print_tables(results: list[dict[str, Any]]) -> None:
    """Print the rows of all tables in Markdown."""
    comparisons = [("equal bytes", setting) for setting in UNIFORM] + [("ablation", "2/4")]
    for table, setting in comparisons:
        print(
            f"\n{table}, {setting}, 5 epochs: accuracy in %, mean and spread (s.d.) of the seeds; "
            "training losses"
        )
        for method in dict.fromkeys(r.method for r in all_rows() if r.table == table):
            key = {"table": table, "setting": setting, "method": method}
            if seeds := [r for r in results if key.items() <= r.items()]:
                print(comparison_line(method, seeds))
    for table in ("SDQ's setting", "default recipe"):
        print(f"\n{table}, 15 epochs")
        for r in results:
            if r["table"] == table:
                print(single_line(r, GOALS.get(r["setting"], SDQ_GOAL)))


def single_line(r: dict[str, Any], goal: float) -> str:
    """Return one line of a table of single runs."""
    accuracy, totals = r["accuracy"], r["totals"]
    return (
        f"| {r['setting']} | {r['method']} | {r['commit']} "
        f"| {totals['bytes']:,} | {totals['average_bits']:.3f} "
        f"| {accuracy['quantized']:.2f} | {accuracy['drop']:.2f} | {goal} |"
    )


def comparison_line(method: str, seeds: list[dict[str, Any]]) -> str:
    """Return one line of the comparison at equal bytes."""
    accuracy = [r["accuracy"]["quantized"] for r in seeds]
    spread = f"{statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "-"
    size = max(r["totals"]["bytes"] for r in seeds)
    each = " ".join(f"{a:.2f}" for a in accuracy)
    loss = " ".join(f"{r['training_loss']:.4f}" if "training_loss" in r else "-" for r in seeds)
    return f"| {method} | {size:,} | {statistics.mean(accuracy):.2f} | {spread} | {each} | {loss} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*", metavar="CHECKPOINT FILE.py:FACTORY CIFAR10_FOLDER")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="parts of names")
    parser.add_argument("--jobs", type=int, default=1)
    runs = Path(tempfile.gettempdir()) / f"ddq-evidence-{commit()}"
    parser.add_argument("--runs", type=Path, default=runs, help="folder of the run folders")
    parser.add_argument("--table", nargs="?", type=Path, const=RESULTS, metavar="RESULTS")
    args = parser.parse_args()
    if args.table:
        print_tables(read_results(args.table))
        return
    if len(args.model) != 3:
        parser.error("give CHECKPOINT, FILE.py:FACTORY and CIFAR10_FOLDER, or --table")
    rows = [r for r in missing_rows(read_results(RESULTS)) if any(t in r.name for t in args.only)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if args.jobs > 1:
        environment["OMP_NUM_THREADS"] = "1"
    lock = threading.Lock()

    def work(row: Row) -> None:
        result = train(row, args.model, args.runs, environment)
        with lock, RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{row.name}: {result['accuracy']['quantized']:.2f} %", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(work, rows):  # raises the first exception of a job
            pass
    print_tables(read_results(RESULTS))


if __name__ == "__main__":
    main()
