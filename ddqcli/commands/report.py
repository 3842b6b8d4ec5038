"""`ddq report`: what a run, or an exported file, holds; reads JSON and numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddqcli.engine.runs import Run
from ddqcli.errors import UsageError, VerificationError
from ddqcli.recipe import parse_size
from ddqcli.text import numbers_in_order

if TYPE_CHECKING:
    from ddqcli.artifact.format import Artifact

_CARRIED = ("accuracy", "source", "run", "warnings")  # parts of a report that travel in the file as they are


@dataclass(frozen=True)
class Limits:
    """What a report may be held against; None asks for nothing."""

    max_size: str | None = None  # of all tensors: 150kB, 12%
    max_bits: float | None = None  # average stored bits a quantized weight
    max_drop: float | None = None  # points of accuracy lost
    min_accuracy: float | None = None  # percent, of the quantized model

    def unmet(self, report: dict[str, Any]) -> tuple[str, ...]:
        """One sentence for each limit that the report breaks. Raises UsageError for a size that is none."""
        totals, accuracy = report["totals"], report["accuracy"] or {}
        try:
            most = None if self.max_size is None else parse_size(self.max_size, totals["float_bytes"])
        except ValueError as error:
            raise UsageError(f"--max-size: {error}.") from error
        found = (
            _above("--max-size", totals["bytes"], most, "bytes"),
            _above("--max-bits", totals["average_bits"], self.max_bits, "bits a weight"),
            _above("--max-drop", accuracy.get("drop"), self.max_drop, "points"),
            _below("--min-accuracy", accuracy.get("quantized"), self.min_accuracy, "%"),
        )
        return tuple(sentence for sentence in found if sentence)


def _above(gate: str, value: float | None, most: float | None, unit: str) -> str | None:
    if most is None:
        return None
    if value is None:
        return f"{gate} is unmet: nothing was evaluated in this run."
    over = value - most
    return None if over <= 0 else f"{gate} is unmet: {value:,} {unit} are {over:,.6g} above {most:,}."


def _below(gate: str, value: float | None, least: float | None, unit: str) -> str | None:
    if least is None:
        return None
    if value is None:
        return f"{gate} is unmet: nothing was evaluated in this run."
    under = least - value
    return None if under <= 0 else f"{gate} is unmet: {value:,} {unit} are {under:,.6g} below {least:,}."


@dataclass(frozen=True)
class ReportResult:
    """A report, where it came from, and what of the limits it breaks."""

    source: Path
    report: dict[str, Any]
    unmet: tuple[str, ...] = ()
    page: Path | None = None  # where it was written as HTML

    def data(self) -> dict[str, Any]:
        page = {"page": str(self.page)} if self.page else {}
        return {"target": str(self.source), **page, **self.report}


def report(target: Path | None = None, limits: Limits | None = None) -> ReportResult:
    """The report of a run folder (the newest run if None) or of an exported file.

    Raises UsageError, VerificationError.
    """
    if target is not None and target.is_file():
        source, found = target, _from_artifact(target)
    else:
        run = Run.open(target)
        source, found = run.path, run.report()
    return ReportResult(source, found, limits.unmet(found) if limits else ())


def travelling(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that an exported file must carry, as short as it can be; the rest follows from its tensors."""
    rows = sorted(report["layers"], key=lambda row: row["name"])
    return {
        **{key: report[key] for key in _CARRIED},
        "source": {**report["source"], **{key: Path(report["source"][key]).name for key in ("path", "arch")}},
        "kind": [row["kind"] for row in rows],
        "error": [float(f"{row['error']:.3g}") for row in rows],
        "learned": [a["name"] for a in report["activations"] if a["levels"] == "learned"],
        "budget_bytes": report["totals"]["budget_bytes"],
        "float_bytes": report["totals"]["float_bytes"],
    }


def _from_artifact(path: Path) -> dict[str, Any]:
    from ddqcli.artifact.format import read_artifact  # numpy: not needed for a run

    artifact = read_artifact(path)
    try:
        return _rebuilt(artifact, artifact.meta["report"])
    except (LookupError, TypeError, ValueError) as error:
        raise VerificationError(f"{path} carries no report; it was not written by `ddq export`.") from error


def _rebuilt(artifact: Artifact, carried: dict[str, Any]) -> dict[str, Any]:
    from ddqcli.artifact.format import dtype_name

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
    layers.sort(key=lambda layer: numbers_in_order(layer["name"]))
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
        "kept_float": {name: f"stored as {dtype_name(value)}" for name, value in artifact.floats.items()},
        **{key: carried[key] for key in _CARRIED},
    }
