"""A sweep's table: size against accuracy, a row a target."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def swept(data: dict[str, Any], console: Console) -> None:
    """What `ddq finetune` with several targets closes with."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("target", "bytes", "bits a weight", "accuracy", "drop", "run"):
        grid.add_column(
            column, justify="left" if column in ("target", "run") else "right", no_wrap=True
        )
    stored = data["float"]
    grid.add_row("float", f"{stored['bytes']:,}", "", _percent(stored["accuracy"]), "", "")
    for row in data["targets"]:
        grid.add_row(
            row["target"], f"{row['bytes']:,}", f"{row['average_bits']:.3f}", _percent(row["accuracy"]),
            "" if row["drop"] is None else f"{row['drop']:.2f}", row["run"] or "",
        )  # fmt: skip
    console.print(grid)
    console.print()
    for row in data["targets"]:
        for warning in row["warnings"]:
            console.print(f"warning    {row['target']}: {warning}", markup=False, soft_wrap=True)
    if data["run_dir"] is None:
        console.print("dry run    all budgets can be met; nothing was trained", soft_wrap=True)
        return
    folder, last = data["run_dir"], data["targets"][-1]["run"]
    for line in (
        f"runs       {folder}",
        f"picture    {folder}/size-accuracy.png",
        f"next       ddq report {folder}/{last}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}%"
