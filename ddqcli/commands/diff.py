"""`ddq report --diff A B`: two runs or exported files side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.commands.report import report

VERSION = 1
TOTALS = ("bytes", "float_bytes", "budget_bytes", "average_bits", "quantized_bytes", "kept_bytes")
ACCURACY = ("float", "quantized", "drop")
COLUMNS = ("bits", "levels", "bytes", "error")

Pair = dict[str, Any]  # a, b, and their change b - a; None where a side has no such value


@dataclass(frozen=True)
class DiffResult:
    """What differs between two reports."""

    a: Path
    b: Path
    totals: dict[str, Pair]
    accuracy: dict[str, Pair]
    layers: tuple[dict[str, Any], ...]  # name, kind, shape, and a Pair for each of COLUMNS
    activations: tuple[dict[str, Any], ...]  # name and a Pair of bits

    def data(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return {
            "version": VERSION,
            "a": str(self.a),
            "b": str(self.b),
            "totals": self.totals,
            "accuracy": self.accuracy,
            "layers": list(self.layers),
            "activations": list(self.activations),
        }


def diff(a: Path, b: Path) -> DiffResult:
    """Compare two run folders or exported files, in the order of the first. Raises UsageError, VerificationError."""
    first, second = report(a), report(b)
    one, other = first.report, second.report
    return DiffResult(
        first.source,
        second.source,
        {key: pair(one["totals"][key], other["totals"][key]) for key in TOTALS},
        {
            key: pair((one["accuracy"] or {}).get(key), (other["accuracy"] or {}).get(key))
            for key in ACCURACY
        },
        tuple(_joined(one["layers"], other["layers"], ("kind", "shape"), COLUMNS)),
        tuple(_joined(one["activations"], other["activations"], (), ("bits",))),
    )


def pair(a: float | None, b: float | None) -> Pair:
    """Two values and the step from the first to the second, free of the noise of binary fractions."""
    change = (
        None
        if a is None or b is None
        else float(f"{b - a:.6g}")
        if isinstance(b - a, float)
        else b - a
    )
    return {"a": a, "b": b, "change": change}


def _joined(
    one: list[dict[str, Any]],
    other: list[dict[str, Any]],
    facts: tuple[str, ...],
    columns: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Rows of both by their names; `facts` are the first side's where it has the row."""
    left, right = ({row["name"]: row for row in rows} for rows in (one, other))
    joined = []
    for name in {**left, **right}:
        a, b = left.get(name, {}), right.get(name, {})
        same = {fact: (a or b)[fact] for fact in facts}
        joined.append(
            {
                "name": name,
                **same,
                **{column: pair(a.get(column), b.get(column)) for column in columns},
            }
        )
    return joined
