"""A run's report as a table, CSV or Markdown; and the closing words of finetune."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.console import Console
from rich.table import Table

from ddqcli.formatting import shorten

COLUMNS = ("name", "kind", "shape", "bits", "levels", "bytes", "share", "error")
_NUMBERS = {"bits", "levels", "bytes", "share", "error"}


def rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row of text a layer; `share` is of all quantized bytes."""
    total = max(1, report["totals"]["quantized_bytes"])
    return [
        {
            "name": layer["name"],
            "kind": layer["kind"],
            "shape": "×".join(map(str, layer["shape"])) or "1",
            "bits": f"{layer['bits']:g}",
            "levels": str(layer["levels"]),
            "bytes": f"{layer['bytes']:,}",
            "share": f"{100 * layer['bytes'] / total:.1f}%",
            "error": f"{100 * layer['error']:.2f}%",
        }
        for layer in report["layers"]
    ]


def table(report: dict[str, Any], console: Console) -> None:
    """The table, then the totals."""
    wide = console.width >= 100
    shown = [c for c in COLUMNS if wide or c != "kind"]
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        grid.add_column(
            column,
            justify="right" if column in _NUMBERS else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows(report):
        grid.add_row(*(shorten(row[c], 30 if not wide else 60) for c in shown))
    console.print(grid)
    console.print()
    for line in totals(report):
        console.print(line, markup=False, soft_wrap=True)


def totals(report: dict[str, Any]) -> list[str]:
    """Size, budget and accuracy in a few lines."""
    t, a = report["totals"], report["accuracy"]
    saved = t["float_bytes"] / max(1, t["bytes"])
    lines = [
        f"size       {t['float_bytes']:,} -> {t['bytes']:,} bytes ({saved:.1f}x smaller), {t['average_bits']:.3f} bits a weight"
    ]
    if t["budget_bytes"] is not None:
        used = 100 * t["bytes"] / t["budget_bytes"]
        lines.append(f"budget     {t['budget_bytes']:,} bytes, {used:.1f}% used")
    if report["activations"]:
        bits = sorted({a["bits"] for a in report["activations"]})
        lines.append(
            f"inputs     {len(report['activations'])} layers' inputs at {'/'.join(map(str, bits))} bits"
        )
    if a:
        lines.append(
            f"accuracy   {a['float']:.2f}% float -> {a['quantized']:.2f}% quantized ({0 - a['drop']:+.2f} points)"
        )
    lines += [f"warning    {warning}" for warning in report["warnings"]]
    return lines


def as_csv(report: dict[str, Any]) -> str:
    """The layers as CSV, numbers unformatted."""
    stream = io.StringIO()
    names = ("name", "kind", "shape", "bits", "levels", "bytes", "float_bytes", "error")
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for layer in report["layers"]:
        writer.writerow(
            {**{n: layer[n] for n in names}, "shape": "x".join(map(str, layer["shape"]))}
        )
    return stream.getvalue().rstrip("\n")


def as_markdown(report: dict[str, Any]) -> str:
    """Totals and layers as Markdown, fit for a CI job's summary."""
    lines = [
        "### ddq report",
        "",
        *(f"- {line.replace('  ', ' ').strip()}" for line in totals(report)),
        "",
    ]
    lines.append("| " + " | ".join(COLUMNS) + " |")
    lines.append("| " + " | ".join("---:" if c in _NUMBERS else "---" for c in COLUMNS) + " |")
    lines += ["| " + " | ".join(row[c] for c in COLUMNS) + " |" for row in rows(report)]
    return "\n".join(lines)


def finetuned(data: dict[str, Any], console: Console) -> None:
    """What `ddq finetune` closes with."""
    for line in totals(data):
        console.print(line, markup=False, soft_wrap=True)
    if data["run_dir"] is None:
        console.print(
            "dry run    the budget can be met; nothing was trained, so the bits follow from the weights alone",
            soft_wrap=True,
        )
        return
    console.print(f"run        {data['run_dir']}", markup=False, soft_wrap=True)
    console.print(
        "next       ddq report   ddq export   ddq inspect " + data["source"]["path"],
        markup=False,
        soft_wrap=True,
    )
