"""`ddq report --html`: one self-contained page of a run or an exported file, with what was learned and how; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.inspection import html
from ddqcli.inspection.figures import PAGE, folder
from ddqcli.inspection.history import draw_bits, draw_course
from ddqcli.inspection.trained import ERROR
from ddqcli.runs.run import Run


def write_page(source: Path, report: dict[str, Any], path: Path) -> Path:
    """Write the page as `path`, or as index.html into it if it is no name of a page; return where. Raises DDQError."""
    page = path if path.suffix in {".html", ".htm"} and not path.is_dir() else path / PAGE
    weights = [row for row in report["layers"] if row["kind"] != "bias"]
    if source.is_dir():
        drawings = [draw_bits(weights), *draw_course(Run.open(source), weights)]
    else:
        drawings = [draw_bits(weights, "the names'")]
    pictures = [
        html.Section(
            drawing.title,
            [drawing.text],
            pictures=[_element(figure) for figure in drawing.figures.values()],
        )
        for drawing in drawings
    ]
    with folder(page.parent):
        name = source.resolve().name
        return html.write_html(
            page, f"ddq report: {name}", [_totals(source, report), *pictures, _layers(report)]
        )


def _totals(source: Path, report: dict[str, Any]) -> html.Section:
    totals, origin = report["totals"], report["source"]
    accuracy = report["accuracy"] or {}
    rows = [
        ["bytes", f"{totals['float_bytes']:,}", f"{totals['bytes']:,}"],
        ["kept as they were", "", f"{totals['kept_bytes']:,}"],
        ["stored bits a weight", "", f"{totals['average_bits']:.3f}"],
    ]
    if accuracy:
        rows.append(["accuracy", f"{accuracy['float']:.2f} %", f"{accuracy['quantized']:.2f} %"])
    run = report["run"]
    text = [
        f"{source}: {origin['path']} ({origin['arch']}), {run['steps']:,} steps, seed {run['seed']}, "
        f"{totals['float_bytes'] / max(1, totals['bytes']):.1f} times smaller."
    ]
    if (budget := totals["budget_bytes"]) is not None:
        text.append(f"Budget: {budget:,} bytes, {100 * totals['bytes'] / budget:.1f} % used.")
    if inputs := report["activations"]:
        bits = "/".join(map(str, sorted({entry["bits"] for entry in inputs})))
        text.append(f"Inputs of {len(inputs)} layers are quantized to {bits} bits.")
    text += [f"Warning: {warning}." for warning in report["warnings"]]
    return html.Section("Result", text, html.Table(["", "float", "quantized"], rows))


def _layers(report: dict[str, Any]) -> html.Section:
    total = max(1, report["totals"]["quantized_bytes"])
    rows = [
        [
            row["name"], row["kind"], "×".join(map(str, row["shape"])), f"{row['bits']:g}", str(row["levels"]),
            f"{row['float_bytes']:,}", f"{row['bytes']:,}", f"{100 * row['bytes'] / total:.1f}", f"{100 * row['error']:.2f}",
        ]
        for row in report["layers"]
    ]  # fmt: skip
    header = [
        "tensor",
        "kind",
        "shape",
        "bits",
        "levels",
        "float bytes",
        "bytes",
        "share, %",
        "error, %",
    ]
    return html.Section("Quantized tensors", [ERROR], html.Table(header, rows, text=3))


def _element(figure: Figure) -> str:
    return plots.for_page(plots.svg_of(figure))
