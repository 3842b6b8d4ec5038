"""`ddq export`: a finished run as one safetensors file, read back and compared with what was trained."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddqcli.artifact import decoder
from ddqcli.artifact.format import BFLOAT16, ActivationTable, QuantizedTensor, Sizes, encode_artifact
from ddqcli.commands.report import travelling
from ddqcli.engine.runs import FINAL, Run, write_whole
from ddqcli.errors import DDQError, VerificationError
from ddqcli.recipe import Recipe

ARTIFACT = "model.safetensors"
_FINGERPRINTS = """
import hashlib, json, runpy, sys
tensors = runpy.run_path(sys.argv[1])["decode"](sys.argv[2])[0].items()
seen = {name: [str(t.dtype), list(t.shape), hashlib.sha256(t.tobytes()).hexdigest()] for name, t in tensors}
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class ExportResult:
    """A written and verified file."""

    run_dir: Path
    path: Path
    sizes: Sizes
    float_bytes: int
    tensors: int  # compared bit for bit
    values: int

    def data(self) -> dict[str, Any]:
        sizes = {**asdict(self.sizes), "payload": self.sizes.payload, "file": self.sizes.file}
        return {
            "run_dir": str(self.run_dir), "path": str(self.path), "float_bytes": self.float_bytes, "sizes": sizes,
            "verified": {"tensors": self.tensors, "values": self.values},
        }  # fmt: skip


def export(run_dir: Path | None = None, out: Path | None = None) -> ExportResult:
    """Write the run's model to `out` (default: model.safetensors in the run folder) and verify it.

    Raises UsageError, and VerificationError if the file, read back by the numpy-only decoder in another process, differs
    in any bit from what was trained; it is then not written.
    """
    run = Run.open(run_dir)
    frozen, report = run.load(FINAL), run.report()
    path = out or run.path / ARTIFACT
    floats = {name: _numpy(value) for name, value in frozen["floats"].items()}
    meta = {"report": travelling(report), "recipe": _portable(run.recipe())}
    raw, sizes = encode_artifact(
        [_quantized(entry) for entry in frozen["quantized"]], [_activation(a) for a in frozen["activations"]],
        floats, frozen["aliases"], meta,
    )  # fmt: skip
    expected = {name: value.numpy() for name, value in frozen["trained"].items()} | floats
    expected |= {alias: expected[name] for alias, name in frozen["aliases"].items()}

    def write(temporary: Path) -> None:
        temporary.write_bytes(raw)
        _verify(temporary, expected, path)

    write_whole(path, write)  # what is not as trained never gets its name
    values = sum(array.size for array in expected.values())
    return ExportResult(run.path, path, sizes, report["totals"]["float_bytes"], len(expected), values)


def _portable(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says beyond its defaults, files by name alone: where they lie is no property of the model."""
    said = recipe.model_dump(exclude_defaults=True)
    for section, field in (("model", "checkpoint"), ("model", "arch"), ("data", "source")):
        if value := said.get(section, {}).get(field):
            said[section][field] = Path(value).name
    return said


def _verify(file: Path, expected: dict[str, np.ndarray], name: Path) -> None:
    """Decode the file, which is to become `name`, in a fresh process that knows nothing but numpy; compare every bit."""
    command = [sys.executable, "-I", "-c", _FINGERPRINTS, decoder.__file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise VerificationError(f"{name} cannot be decoded: {reason[-1]}; it was not written.")
    found = json.loads(done.stdout)
    if found.keys() != expected.keys():
        raise VerificationError(f"{name} would not hold the tensors that were trained; it was not written.")
    for tensor, array in expected.items():
        fingerprint = [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        if found[tensor] != fingerprint:
            raise VerificationError(f"{name} would differ from what was trained in {tensor}; it was not written.")


def _quantized(entry: dict[str, Any]) -> QuantizedTensor:
    return QuantizedTensor(
        entry["name"], tuple(entry["shape"]), entry["axis"], entry["indices"].numpy().reshape(-1),
        tuple(level.numpy() for level in entry["levels"]), entry["scale"].numpy(), entry["zero_point"].numpy(),
    )  # fmt: skip


def _activation(entry: dict[str, Any]) -> ActivationTable:
    return ActivationTable(f"{entry['name']} (input)", entry["levels"].numpy(), entry["scale"], entry["zero_point"])


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of the same bits; numpy has no bfloat16 of its own."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BFLOAT16)
    try:
        return tensor.numpy()
    except TypeError as error:
        raise DDQError(
            f"A tensor of {tensor.dtype} cannot be stored; keep it out of the model's state dict."
        ) from error
