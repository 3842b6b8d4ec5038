"""`ddq report`: what a run, or an exported file, holds; reads JSON and numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.artifact.format import Artifact, read_artifact
from ddqcli.engine.runs import Run
from ddqcli.errors import VerificationError

_CARRIED = ("accuracy", "source", "run", "kept_float")  # parts of a report that travel in the file as they are


@dataclass(frozen=True)
class ReportResult:
    """A report and where it came from."""

    source: Path
    report: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return {"target": str(self.source), **self.report}


def report(target: Path | None = None) -> ReportResult:
    """The report of a run folder (the newest run if None) or of an exported file.

    Raises UsageError, VerificationError.
    """
    if target is not None and target.is_file():
        return ReportResult(target, _from_artifact(target))
    run = Run.open(target)
    return ReportResult(run.path, run.report())


def travelling(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that an exported file must carry; the rest follows from its tensors."""
    rows = sorted(report["layers"], key=lambda row: row["name"])
    return {
        **{key: report[key] for key in _CARRIED},
        "source": {**report["source"], "path": Path(report["source"]["path"]).name},
        "kind": [row["kind"] for row in rows],
        "error": [row["error"] for row in rows],
        "learned": [a["name"] for a in report["activations"] if a["levels"] == "learned"],
        "budget_bytes": report["totals"]["budget_bytes"],
        "float_bytes": report["totals"]["float_bytes"],
    }


def _from_artifact(path: Path) -> dict[str, Any]:
    artifact = read_artifact(path)
    try:
        return _rebuilt(artifact, artifact.meta["report"])
    except (LookupError, TypeError, ValueError) as error:
        raise VerificationError(f"{path} carries no report; it was not written by `ddq export`.") from error


def _rebuilt(artifact: Artifact, carried: dict[str, Any]) -> dict[str, Any]:
    tensors = sorted(artifact.quantized.values(), key=lambda t: t.name)
    layers = [
        {
            "name": tensor.name,
            "kind": kind,
            "shape": list(tensor.shape),
            "bits": tensor.bits[0] if len(set(tensor.bits)) == 1 else round(sum(tensor.bits) / len(tensor.bits), 4),
            "levels": max(len(set(levels.tolist())) for levels in tensor.levels),
            "bytes": tensor.nbytes,
            "float_bytes": 4 * tensor.indices.size,
            "error": error,
        }
        for tensor, kind, error in zip(tensors, carried["kind"], carried["error"], strict=True)
    ]
    quantized, weights = sum(t.nbytes for t in tensors), sum(t.indices.size for t in tensors)
    activations = [
        {"name": name.removesuffix(" (input)"), "bits": table.bits, "bytes": table.nbytes}
        for name, table in artifact.activations.items()
    ]
    for entry in activations:
        entry["levels"] = "learned" if entry["name"] in carried["learned"] else "uniform"
    return {
        "version": 1,
        "layers": layers,
        "totals": {
            "bytes": artifact.sizes.payload,
            "float_bytes": carried["float_bytes"],
            "budget_bytes": carried["budget_bytes"],
            "average_bits": round(8 * quantized / max(1, weights), 4),
            "quantized_bytes": quantized,
            "kept_bytes": artifact.sizes.payload - quantized,
            "weights": weights,
        },
        "activations": activations,
        **{key: carried[key] for key in _CARRIED},
    }
