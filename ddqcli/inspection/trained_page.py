"""The pictures of `ddq inspect` for a run or an exported file: its own levels over the weights, bits by layer, and one page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ddqcli import plots
from ddqcli.formatting import percent, size
from ddqcli.inspection import html
from ddqcli.inspection.figures import PAGE, draw_layers, folder
from ddqcli.inspection.history import FigureGroup, draw_bits, draw_course
from ddqcli.inspection.trained import ERROR, FIXED, TrainedResult, TrainedRow
from ddqcli.inspection.weights import Progress
from ddqcli.runs.run import Run

KINDS = ("trained", "uniform", "power_of_two", "best")
OF = {
    "run": "Histograms are of the float weights after finetuning; lines are the levels in force, to which each is rounded.",
    "artifact": "An exported file holds no float weights: the bars are the stored values, as many as lie on each level.",
}
MOST_LEVELS = 128  # more would hide the histogram under them: at 8 bits they are an even grid


def write_pictures(
    result: TrainedResult, out: Path, on_progress: Progress | None = None
) -> TrainedResult:
    """Write PNG and SVG files and the page into `out`; the result then names them, the page first. Raises DDQError."""
    with folder(out):
        drawn = draw_layers([_layer(row) for row in result.layers], {}, out, on_progress)
        sections = [_size(result), html.Section("Layers", _notes(result), _table(result))]
        sections.append(
            html.Section("Weights and their levels", [OF[result.what]], pictures=drawn.layers)
        )
        for drawing in _drawings(result):
            elements = []
            for stem, figure in drawing.figures.items():
                drawn.files.extend(plots.save(figure, out / stem))
                elements.append(plots.for_page(drawn.files[-1].read_text(encoding="utf-8")))
            sections.append(html.Section(drawing.title, [drawing.text], pictures=elements))
        page = html.write_html(out / PAGE, f"Levels of {result.path.resolve().name}", sections)
    return replace(result, pictures=(page, *drawn.files))


def _drawings(result: TrainedResult) -> list[FigureGroup]:
    shown = {row.name for row in result.layers}
    rows = [row for row in result.report["layers"] if row["name"] in shown]
    if result.what == "run":
        return [draw_bits(rows), *draw_course(Run.open(result.path), rows)]
    return [draw_bits(rows, "the names'")]


def _layer(row: TrainedRow) -> plots.Layer:
    hidden = len(row.levels) > MOST_LEVELS
    at_levels = row.distribution is None and bool(row.levels) and not hidden
    said = f"{len(row.levels)} levels in force ({row.bits:g} bits)" if row.levels else ""
    said += (
        ", a dense grid that is not drawn" * hidden
        + ", and how many weights lie on each" * at_levels
    )
    return plots.Layer(
        row.name, row.kind, row.distribution or "as stored", row.min, row.max, row.counts if at_levels else row.histogram,
        () if hidden else row.levels, said, learned=True, counts_at_levels=at_levels,
    )  # fmt: skip


def _size(result: TrainedResult) -> html.Section:
    totals, accuracy = result.report["totals"], result.report["accuracy"]
    sizes = f"{size(totals['float_bytes'])} became {size(totals['bytes'])}, {totals['average_bits']:.3f} bits a weight."
    if accuracy:
        sizes += (
            f" Accuracy: {accuracy['float']:.2f} % float, {accuracy['quantized']:.2f} % quantized."
        )
    return html.Section("Size", [f"{result.path}: {result.note}.", sizes])


def _notes(result: TrainedResult) -> list[str]:
    return [ERROR, FIXED] if result.what == "run" else [ERROR]


def _table(result: TrainedResult) -> html.Table:
    kinds = KINDS if result.what == "run" else KINDS[:1]
    header = [
        "layer",
        "kind",
        "shape",
        "distribution",
        "parameters",
        "bytes",
        "bits",
        "levels",
        "min",
        "max",
        *kinds,
    ]
    rows = [
        [
            row.name, row.kind, "×".join(map(str, row.shape)), row.distribution or "",
            f"{row.parameters:,}", f"{row.bytes:,}", f"{row.bits:g}", str(len(row.levels) or ""),
            f"{row.min:.3g}", f"{row.max:.3g}",
            *("" if (error := row.error[kind]) is None else percent(error) for kind in kinds),
        ]
        for row in result.layers
    ]  # fmt: skip
    return html.Table([h.replace("power_of_two", "pow2") for h in header], rows, text=4)
