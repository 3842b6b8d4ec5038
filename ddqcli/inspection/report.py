"""The report of a run folder or of an exported file, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddqcli.errors import VerificationError
from ddqcli.formatting import natural_sort_key
from ddqcli.runs.run import Run

if TYPE_CHECKING:
    from ddqcli.artifact.format import Artifact

_CARRIED = (
    "accuracy",
    "source",
    "run",
    "warnings",
)  # parts of a report that travel in the file as they are


def embedded_report(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that an exported file must carry, as short as it can be; the rest follows from its tensors."""
    rows = sorted(report["layers"], key=lambda row: row["name"])
    return {
        **{key: report[key] for key in _CARRIED},
        "source": {
            **report["source"],
            **{key: Path(report["source"][key]).name for key in ("path", "arch")},
        },
        "kind": [row["kind"] for row in rows],
        "error": [float(f"{row['error']:.3g}") for row in rows],
        "learned": [a["name"] for a in report["activations"] if a["levels"] == "learned"],
        "budget_bytes": report["totals"]["budget_bytes"],
        "float_bytes": report["totals"]["float_bytes"],
    }


def read_report(target: Path | None) -> tuple[Path, dict[str, Any]]:
    """The report of a run folder (the newest run if None) or of an exported file, and its path.

    Raises UsageError, DDQError for a damaged run and VerificationError for a damaged file.
    """
    if target is not None and target.is_file():
        return target, _from_artifact(target)
    run = Run.open(target)
    return run.path, run.report()


def _from_artifact(path: Path) -> dict[str, Any]:
    from ddqcli.artifact.format import read_artifact

    artifact = read_artifact(path)
    try:
        return _rebuilt(artifact, artifact.meta["report"])
    except (LookupError, TypeError, ValueError) as error:
        raise VerificationError(
            f"{path} carries no report; it was not written by `ddq export`."
        ) from error


def _rebuilt(artifact: Artifact, carried: dict[str, Any]) -> dict[str, Any]:
    from ddqcli.artifact.format import dtype_name

    tensors = sorted(artifact.quantized.values(), key=lambda t: t.name)
    layers = [
        {
            "name": tensor.name,
            "kind": kind,
            "shape": list(tensor.shape),
            "bits": tensor.bits[0]
            if len(set(tensor.bits)) == 1
            else round(sum(tensor.bits) / len(tensor.bits), 4),
            "levels": max(len(set(levels.tolist())) for levels in tensor.levels),
            "bytes": tensor.nbytes,
            "float_bytes": 4 * tensor.indices.size,
            "error": error,
        }
        for tensor, kind, error in zip(tensors, carried["kind"], carried["error"], strict=True)
    ]
    layers.sort(key=lambda layer: natural_sort_key(layer["name"]))
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
            "average_bits": 8 * quantized / max(1, weights),
            "quantized_bytes": quantized,
            "kept_bytes": artifact.sizes.payload - quantized,
            "weights": weights,
        },
        "activations": activations,
        "kept_float": {
            name: f"stored as {dtype_name(value)}" for name, value in artifact.floats.items()
        },
        **{key: carried[key] for key in _CARRIED},
    }
