"""Train one network a family for a few steps and export it, by `ddq` itself, on noise.

    python tests/benchmarks/families.py [--only TEXT ...] [--max-steps 2] [--act-bits 8]
        [--threads 2] [--json FILE]

Families are those of torchvision (image classifiers, segmenters, detectors, video, optical flow),
a transformer encoder and decoder, a CRNN and a Conformer; nearly all are narrow. A row says what
share of the values is quantized, and whether the safetensors file and the ONNX file passed their
verification; sentences below it are the errors and warnings of ddq. All take about half an hour on
one thread. The exit code is 1 if training or the safetensors file of any fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from family_networks import FAMILIES, build, data
from torch import nn

from ddqcli.data.trees import call

HERE = Path(__file__).resolve().parent
HEAD = (
    f"{'network':<22}{'parameters':>12}{'quantized':>11}"
    f"{'trained':>9}{'file':>6}{'ONNX':>6}{'s':>6}"
)


@dataclass
class Row:
    """The result for one network."""

    network: str
    parameters: int
    share: float | None = None  # of the values that is quantized
    trained: bool = False
    file: bool = False
    onnx: bool = False
    seconds: float = 0.0
    sentences: list[str] = field(default_factory=list)  # errors and warnings

    def line(self) -> str:
        share = "-" if self.share is None else f"{100 * self.share:.1f} %"
        marks = ["yes" if each else "no" for each in (self.trained, self.file, self.onnx)]
        text = f"{self.network:<22}{self.parameters:>12,}{share:>11}"
        text += f"{marks[0]:>9}{marks[1]:>6}{marks[2]:>6}{self.seconds:>6.0f}"
        return "\n    ".join([text, *self.sentences])


def measure(name: str, folder: Path, options: list[str]) -> Row:
    """Train and export a network in a folder of its own."""
    net = settled(build(name), data(name))
    row = Row(name, sum(p.numel() for p in net.parameters()))
    torch.save(net.state_dict(), folder / "model.pt")
    del net
    began = time.monotonic()
    source = HERE / "family_networks.py"
    named = [f"{key}.kwargs.name={name}" for key in ("model", "data")]
    factories = ["--arch", f"{source}:build", "--data", f"{source}:data"]
    sets = [*named, "data.batch_size=4", "data.workers=0"]
    flags = [part for value in sets for part in ("--set", value)]
    arguments = ["finetune", "model.pt", *factories, *flags, "--run-dir", "run", *options]
    row.trained, report = ddq(folder, arguments, row)
    if row.trained:
        row.share = report["totals"]["weights"] / max(1, row.parameters)
        row.sentences += [f"warning: {text}" for text in report["warnings"]]
        row.file, _ = ddq(folder, ["export", "run"], row)
        row.onnx, _ = ddq(folder, ["export", "run", "--format", "onnx"], row)
    row.seconds = round(time.monotonic() - began, 1)
    return row


def settled(net: nn.Module, given: dict[str, Any]) -> nn.Module:
    """Give BatchNorm the statistics of the data, as training would."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    inputs, _ = torch.utils.data.default_collate(given["train"])
    with torch.no_grad():
        call(net.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net


def ddq(folder: Path, arguments: list[str], row: Row) -> tuple[bool, dict[str, Any]]:
    """Run a command of ddq in a folder; add its errors to the row."""
    command = [sys.executable, "-m", "ddqcli", *arguments, "--json", "--quiet"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    try:
        envelope = json.loads(process.stdout)
    except json.JSONDecodeError:
        envelope = {"errors": [(process.stderr or process.stdout)[-500:]], "data": None}
    if process.returncode:
        texts = [e["message"] if isinstance(e, dict) else str(e) for e in envelope["errors"]]
        row.sentences += [f"{arguments[0]} exit {process.returncode}: {text}" for text in texts]
    return process.returncode == 0, envelope["data"] or {}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="parts of names")
    parser.add_argument("--max-steps", type=int, default=2)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    flags = ["--target-bits", "4", "--max-steps", str(options.max_steps)]
    flags += ["--act-bits", str(options.act_bits)]
    print(HEAD, flush=True)
    rows = []
    for name in (n for n in FAMILIES if any(part in n for part in options.only)):
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Path(folder), flags)
        print(row.line(), flush=True)
        rows.append(row)
        if options.json:
            text = json.dumps([asdict(each) for each in rows], indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    passed = sum(row.trained and row.file for row in rows)
    in_onnx = sum(row.onnx for row in rows)
    print(f"{passed} of {len(rows)} trained and exported, {in_onnx} in ONNX too")
    return 0 if rows and passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
