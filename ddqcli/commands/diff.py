"""`ddq report --diff A B`: two runs or exported files side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ddqcli.inspection.report import read_report
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.report import ActivationRow, TensorRow

VERSION = 1
TOTALS = (
    *("bytes", "float_bytes", "budget_bytes", "average_bits"),
    *("quantized_bytes", "kept_bytes", "manifest_bytes"),
)
ACCURACY = ("float", "quantized", "drop")
COLUMNS = ("bits", "levels", "bytes", "error")

Pair = dict[str, Any]  # a, b, and change = b - a; None where a side has no such value
Row = TypeVar("Row", TensorRow, ActivationRow)


@dataclass(frozen=True)
class DiffResult:
    """The differences between two reports."""

    a: Path
    b: Path
    totals: dict[str, Pair]
    metric: Metric | None  # None if A and B are judged by different ones
    accuracy: dict[str, Pair]  # without changes where there is no common metric
    layers: tuple[dict[str, Any], ...]  # name, kind, shape, and a Pair for each of COLUMNS
    activations: tuple[dict[str, Any], ...]  # name, and a Pair of bits

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            "version": VERSION,
            "a": str(self.a),
            "b": str(self.b),
            "totals": self.totals,
            "metric": self.metric and self.metric.data(),
            "accuracy": self.accuracy,
            "layers": list(self.layers),
            "activations": list(self.activations),
        }


def diff(a: Path, b: Path) -> DiffResult:
    """Compare two run folders or exported files; rows are in the order of A.

    Raises UsageError, VerificationError.
    """
    (a, first), (b, second) = read_report(a), read_report(b)
    layers = [
        {
            "name": row.name,
            "kind": row.kind,
            "shape": list(row.shape),
            **_pairs(left, right, COLUMNS),
        }
        for row, left, right in _joined(first.layers, second.layers)
    ]
    activations = [
        {"name": row.name, **_pairs(left, right, ("bits",))}
        for row, left, right in _joined(first.activations, second.activations)
    ]
    accuracy = _pairs(first.accuracy, second.accuracy, ACCURACY)
    same_metric = first.metric == second.metric
    if not same_metric:
        accuracy = {name: values | {"change": None} for name, values in accuracy.items()}
    return DiffResult(
        a,
        b,
        totals=_pairs(first.totals, second.totals, TOTALS),
        metric=first.metric if same_metric else None,
        accuracy=accuracy,
        layers=tuple(layers),
        activations=tuple(activations),
    )


def pair(a: float | None, b: float | None) -> Pair:
    """Return two values and their change, free of the rounding noise of binary fractions."""
    change = None
    if a is not None and b is not None:
        change = float(f"{b - a:.6g}") if isinstance(b - a, float) else b - a
    return {"a": a, "b": b, "change": change}


def _pairs(a: object, b: object, fields: Sequence[str]) -> dict[str, Pair]:
    """Pair the fields of two records, either of which may be None."""
    return {field: pair(getattr(a, field, None), getattr(b, field, None)) for field in fields}


def _joined(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row | None, Row | None]]:
    """Join rows by name: the first that has the name, the row of A, the row of B."""
    left, right = ({row.name: row for row in rows} for rows in (a, b))
    return [
        (row, left.get(name), right.get(name)) for name, row in {**left, **right, **left}.items()
    ]
