"""`ddq export`: a finished run as one safetensors file, read back and compared with what was trained."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddqcli.artifact import decoder
from ddqcli.artifact.format import (
    BFLOAT16,
    ActivationTable,
    QuantizedTensor,
    Sizes,
    encode_artifact,
    read_artifact,
)
from ddqcli.commands.verify import BehaviorCheck, behaviour, require_same_behavior
from ddqcli.errors import DDQError, UsageError, VerificationError
from ddqcli.inspection.report import embedded_report
from ddqcli.qat.load import INPUT
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import FINAL, REPORT, Run
from ddqcli.training.evaluate import OnProgress

ARTIFACT = "model.safetensors"
_HALF = "float16"  # in the file's meta: what stays float was rounded to it
_FINGERPRINTS = """
import hashlib, json, runpy, sys
tensors, manifest = runpy.run_path(sys.argv[1])["decode"](sys.argv[2])
tensors.update(manifest["activations"])
seen = {name: [str(t.dtype), list(t.shape), hashlib.sha256(t.tobytes()).hexdigest()] for name, t in tensors.items()}
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class ExportResult:
    """A verified file."""

    run_dir: Path
    path: Path
    sizes: Sizes
    float_bytes: int
    tensors: int  # compared bit for bit
    values: int
    behaviour: BehaviorCheck
    half: bool

    def data(self) -> dict[str, Any]:
        sizes = {**asdict(self.sizes), "payload": self.sizes.payload, "file": self.sizes.file}
        return {
            "run_dir": str(self.run_dir), "path": str(self.path), "format": "ddq", "float_bytes": self.float_bytes,
            "half": self.half, "sizes": sizes, "verified": {"tensors": self.tensors, "values": self.values},
            "behaviour": asdict(self.behaviour),
        }  # fmt: skip


@dataclass(frozen=True)
class Frozen:
    """What a run's final state holds, as a file does."""

    quantized: list[QuantizedTensor]
    activations: list[ActivationTable]
    floats: dict[str, np.ndarray]
    aliases: dict[str, str]
    trained: dict[
        str, np.ndarray
    ]  # values of the quantized tensors, as the trained network had them

    @classmethod
    def of(cls, run: Run, *, half: bool = False) -> Frozen:
        """Of a finished run; with `half`, what stays float rounded to float16. Raises UsageError, DDQError."""
        frozen = run.load(FINAL)
        floats = {name: _numpy(value) for name, value in frozen["floats"].items()}
        return cls(
            [_quantized(entry) for entry in frozen["quantized"]],
            [_activation(entry) for entry in frozen["activations"]],
            {name: _halved(name, value) for name, value in floats.items()} if half else floats,
            frozen["aliases"],
            {name: value.numpy() for name, value in frozen["trained"].items()},
        )

    def weights(self) -> dict[str, QuantizedTensor]:
        """The quantized tensors under all of their names."""
        found = {tensor.name: tensor for tensor in self.quantized}
        return found | {alias: found[name] for alias, name in self.aliases.items() if name in found}

    def expected(self) -> dict[str, np.ndarray]:
        """What a reader of the file must find, by name."""
        found = self.trained | self.floats
        found |= {alias: found[name] for alias, name in self.aliases.items()}
        return found | {table.name: table.values() for table in self.activations}


def export(
    run_dir: Path | None = None,
    out: Path | None = None,
    *,
    half: bool = False,
    on_progress: OnProgress | None = None,
) -> ExportResult:
    """Write the run's model to `out` (default: model.safetensors in the run folder) and verify it.

    `half` stores what stays float as float16, and measures the accuracy that the file then has.

    Raises UsageError, and VerificationError if the file, read back by the numpy-only decoder in another process, differs
    in any bit from what was trained, or the network made of it in what it computes; it is then not written.
    """
    run = Run.open(run_dir)
    frozen, report = Frozen.of(run, half=half), run.report()
    path = out or run.path / ARTIFACT
    carried = embedded_report(report)
    meta = {"report": carried, "recipe": _portable(run.recipe()), **({_HALF: True} if half else {})}
    results = []

    def encoded() -> tuple[bytes, Sizes]:
        return encode_artifact(
            frozen.quantized, frozen.activations, frozen.floats, frozen.aliases, meta
        )

    def write(temporary: Path) -> None:
        raw, sizes = encoded()
        temporary.write_bytes(raw)
        _verify(temporary, frozen.expected(), f"{path} would", "; it was not written")
        found = behaviour(temporary, run, on_progress)
        if half:
            carried["accuracy"] = _accuracy_of(found, report)
            raw, sizes = encoded()
            temporary.write_bytes(raw)
            _verify(temporary, frozen.expected(), f"{path} would", "; it was not written")
        else:
            require_same_behavior(found, path, quantized_inputs=bool(frozen.activations))
        results.append((sizes, found))

    write_atomic(path, write)  # what is not as trained never gets its name
    return _result(run, path, *results[0], frozen, half)


def check(
    file: Path, run_dir: Path | None = None, *, on_progress: OnProgress | None = None
) -> ExportResult:
    """Verify a file found later against the run it came from: `run_dir`, or the folder it lies in, or the newest run.

    Raises UsageError, and VerificationError if it is damaged or not what was trained.
    """
    beside = file.parent if (file.parent / REPORT).is_file() else None
    artifact = read_artifact(file)
    try:
        run = Run.open(run_dir or beside)
    except UsageError as error:
        raise UsageError(
            f"{file} is undamaged, but there is nothing to compare it with: {error}"
        ) from error
    half = bool(artifact.meta.get(_HALF))
    _check_origin(file, artifact.meta.get("report"), embedded_report(run.report()), run)
    frozen = Frozen.of(run, half=half)
    _verify(file, frozen.expected(), f"{file} does", "")
    found = behaviour(file, run, on_progress)
    if not half:
        require_same_behavior(found, file, quantized_inputs=bool(frozen.activations))
    return _result(run, file, artifact.sizes, found, frozen, half)


def _result(
    run: Run, path: Path, sizes: Sizes, found: BehaviorCheck, frozen: Frozen, half: bool
) -> ExportResult:
    tensors = {name: value for name, value in frozen.expected().items() if not name.endswith(INPUT)}
    values = sum(array.size for array in tensors.values())
    return ExportResult(
        run.path,
        path,
        sizes,
        run.report()["totals"]["float_bytes"],
        len(tensors),
        values,
        found,
        half,
    )


def _check_origin(file: Path, carried: Any, report: Mapping[str, Any], run: Run) -> None:
    """Raise VerificationError if the file says that it came from another run."""
    carried = carried if isinstance(carried, dict) else {}
    other = [key for key in sorted(report) if key != "accuracy" and carried.get(key) != report[key]]
    if other:
        raise VerificationError(
            f"{file} does not come from {run.path}: its {', '.join(other)} differ; "
            f"name its own run, `ddq export RUN --check {file}`."
        )


def _accuracy_of(found: BehaviorCheck, report: Mapping[str, Any]) -> dict[str, float] | None:
    """The report's accuracy with that of the file in the place of the run's. Raises UsageError if it was not measured."""
    if report["accuracy"] is None:
        return None
    if found.accuracy is None:
        raise UsageError(f"--half must say what it costs, and cannot: {'; '.join(found.unchecked)}")
    before = report["accuracy"]["float"]
    return {
        "float": before,
        "quantized": round(found.accuracy, 4),
        "drop": round(before - found.accuracy, 4),
    }


def _portable(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says beyond its defaults, files by name alone: where they lie is no property of the model."""
    said = recipe.model_dump(exclude_defaults=True)
    for section, field in (("model", "checkpoint"), ("model", "arch"), ("data", "source")):
        if value := said.get(section, {}).get(field):
            said[section][field] = ":".join(Path(part).name or part for part in value.split(":"))
    for section in ("model", "data"):
        if kwargs := said.get(section, {}).get("kwargs"):
            said[section]["kwargs"] = _without_places(kwargs)
    return said


def _without_places(value: Any) -> Any:
    """Of every absolute path in it, only the name."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _verify(file: Path, expected: dict[str, np.ndarray], who: str, end: str) -> None:
    """Decode the file in a fresh process that knows nothing but numpy; compare every bit."""
    command = [sys.executable, "-I", "-c", _FINGERPRINTS, decoder.__file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise VerificationError(f"{who.rpartition(' ')[0]} cannot be decoded: {reason[-1]}{end}.")
    found = json.loads(done.stdout)
    if found.keys() != expected.keys():
        raise VerificationError(f"{who} not hold the tensors that were trained{end}.")
    for tensor, array in expected.items():
        fingerprint = [
            str(array.dtype),
            list(array.shape),
            hashlib.sha256(array.tobytes()).hexdigest(),
        ]
        if found[tensor] != fingerprint:
            raise VerificationError(f"{who} differ from what was trained in {tensor}{end}.")


def _quantized(entry: dict[str, Any]) -> QuantizedTensor:
    return QuantizedTensor(
        entry["name"], tuple(entry["shape"]), entry["axis"], entry["indices"].numpy().reshape(-1),
        tuple(level.numpy() for level in entry["levels"]), entry["scale"].numpy(), entry["zero_point"].numpy(),
    )  # fmt: skip


def _activation(entry: dict[str, Any]) -> ActivationTable:
    return ActivationTable(
        entry["name"] + INPUT, entry["levels"].numpy(), entry["scale"], entry["zero_point"]
    )


def _halved(name: str, array: np.ndarray) -> np.ndarray:
    """A float tensor as float16, all else as it is. Raises UsageError for values too large."""
    if array.dtype not in (np.float32, np.float64):
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.any(np.isinf(half) & np.isfinite(array)):
        raise UsageError(
            f"{name} holds values up to {np.abs(array).max():.3g}, beyond float16; export without --half."
        )
    return half


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
