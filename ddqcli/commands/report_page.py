"""`ddq report --html`: one self-contained page of a run or an exported file, with what was learned and how; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ddqcli import html, plots
from ddqcli.commands.inspect import SHOWN_BINS, shown_histogram, summarise
from ddqcli.commands.inspect_trained import ERROR, plain_kind, run_tensors
from ddqcli.commands.pictures import PAGE, folder
from ddqcli.commands.report import ReportResult
from ddqcli.engine.runs import METRICS, Run
from ddqcli.errors import DDQError

POINTS = 400  # along the step axis; a picture has no room for more
LAYERS_WITH_LEVELS = 6


def write_page(result: ReportResult, path: Path) -> Path:
    """Write the page as `path`, or as index.html into it if it is no name of a page; return where. Raises DDQError."""
    page = path if path.suffix in {".html", ".htm"} and not path.is_dir() else path / PAGE
    report = result.report
    weights = [row for row in report["layers"] if row["kind"] != "bias"]
    sections = [_totals(result), _bits(weights, "network's" if result.source.is_dir() else "names'")]
    if result.source.is_dir():
        run = Run.open(result.source)
        try:
            sections += _over_time(run, weights, run.recipe().budget.target_bits)
        except (LookupError, TypeError, ValueError) as error:
            raise DDQError(f"{run.path / METRICS} is damaged; move it away for a page without the course.") from error
    with folder(page.parent):
        name = result.source.resolve().name
        return html.write_html(page, f"ddq report: {name}", [*sections, _layers(report)])


def _totals(result: ReportResult) -> html.Section:
    report, totals = result.report, result.report["totals"]
    source, accuracy = report["source"], report["accuracy"] or {}
    rows = [
        ["bytes", f"{totals['float_bytes']:,}", f"{totals['bytes']:,}"],
        ["kept as they were", "", f"{totals['kept_bytes']:,}"],
        ["stored bits a weight", "", f"{totals['average_bits']:.3f}"],
    ]
    if accuracy:
        rows.append(["accuracy", f"{accuracy['float']:.2f} %", f"{accuracy['quantized']:.2f} %"])
    run = report["run"]
    text = [
        f"{result.source}: {source['path']} ({source['arch']}), {run['steps']:,} steps, seed {run['seed']}, "
        f"{totals['float_bytes'] / max(1, totals['bytes']):.1f} times smaller."
    ]
    if (budget := totals["budget_bytes"]) is not None:
        text.append(f"Budget: {budget:,} bytes, {100 * totals['bytes'] / budget:.1f} % used.")
    if inputs := report["activations"]:
        bits = "/".join(map(str, sorted({entry["bits"] for entry in inputs})))
        text.append(f"Inputs of {len(inputs)} layers are quantized to {bits} bits.")
    text += [f"Warning: {warning}." for warning in report["warnings"]]
    return html.Section("Result", text, html.Table(["", "float", "quantized"], rows))


def _bits(weights: Sequence[dict[str, Any]], order: str) -> html.Section:
    names, kinds, bits = ([row[key] for row in weights] for key in ("name", "kind", "bits"))
    figure = plots.bits_by_layer_figure(names, [plain_kind(kind) for kind in kinds], bits)
    return html.Section("Bits by layer", [f"In the {order} order; biases are left out."], pictures=[_element(figure)])


def _over_time(run: Run, weights: Sequence[dict[str, Any]], target: float | None) -> list[html.Section]:
    names = [row["name"] for row in weights]
    reported, snapshots = run.metrics(), run.snapshots()
    sections = []
    if reported:
        shown = [reported[k] for k in np.unique(np.linspace(0, len(reported) - 1, POINTS).round().astype(int))]
        bits = np.array([[entry["bits"][name] for name in names] for entry in shown], float)
        average = [entry["average_bits"] for entry in shown]
        figure = plots.bits_over_time_figure([entry["step"] for entry in shown], names, bits, average, target)
        text = "The target counts levels, scales and gates too; the bits drawn are those of the weights alone."
        sections.append(html.Section("Bits over time", [text] if target else [], pictures=[_element(figure)]))
        columns = (_thinned([entry[key] for entry in reported]) for key in ("step", "loss", "train_accuracy"))
        sections.append(html.Section("Loss", pictures=[_element(plots.loss_over_time_figure(*columns))]))
    if snapshots:
        steps = [entry["step"] for entry in snapshots]
        errors = {name: [entry["error"][name] for entry in snapshots] for name in names}
        sections.append(
            html.Section("Quantization error over time", [ERROR.replace(", in %", "")],
                         pictures=[_element(plots.error_over_time_figure(steps, errors))])
        )  # fmt: skip
        if pictures := [_element(figure) for figure in _levels(run, snapshots, weights)]:
            text = "Layers of the largest error; beside the levels, the float weights at the end."
            sections.append(html.Section("Levels over time", [text], pictures=pictures))
    return sections


def _levels(run: Run, snapshots: list[dict[str, Any]], weights: Sequence[dict[str, Any]]) -> list[Figure]:
    """The movement of levels, of the layers with the largest error: there they have most to do."""
    drawn = [row for row in weights if row["name"] in snapshots[-1]["levels"]]
    chosen = [row["name"] for row in sorted(drawn, key=lambda row: -row["error"])[:LAYERS_WITH_LEVELS]]
    figures = {}
    for tensor, stored in run_tensors(run.path):
        if tensor.name in chosen:
            distribution = summarise(stored, run.path)
            counts = np.array(shown_histogram(distribution)).reshape(-1, 2).sum(1)
            edges = np.linspace(distribution.low, distribution.high, SHOWN_BINS // 2 + 1)
            seen = [entry for entry in snapshots if tensor.name in entry["levels"]]
            steps, levels = [entry["step"] for entry in seen], [entry["levels"][tensor.name] for entry in seen]
            figures[tensor.name] = plots.levels_over_time_figure(tensor.name, steps, levels, edges, counts)
    return [figures[name] for name in chosen]


def _layers(report: dict[str, Any]) -> html.Section:
    total = max(1, report["totals"]["quantized_bytes"])
    rows = [
        [
            row["name"], row["kind"], "×".join(map(str, row["shape"])), f"{row['bits']:g}", str(row["levels"]),
            f"{row['float_bytes']:,}", f"{row['bytes']:,}", f"{100 * row['bytes'] / total:.1f}", f"{100 * row['error']:.2f}",
        ]
        for row in report["layers"]
    ]  # fmt: skip
    header = ["tensor", "kind", "shape", "bits", "levels", "float bytes", "bytes", "share, %", "error, %"]
    return html.Section("Quantized tensors", [ERROR], html.Table(header, rows, text=3))


def _thinned(values: Sequence[float]) -> list[float]:
    """Means of neighbours, so that at most POINTS are left."""
    parts = np.array_split(np.asarray(values, float), min(POINTS, len(values)))
    return [float(part.mean()) for part in parts]


def _element(figure: Figure) -> str:
    return plots.for_page(plots.svg_of(figure))
