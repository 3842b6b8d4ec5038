"""The page of `ddq inspect` for a run or an exported file, with its figures."""

from __future__ import annotations

from pathlib import Path

from ddqcli import plots
from ddqcli.formatting import percent
from ddqcli.inspection import html
from ddqcli.inspection.checkpoint_rows import Progress
from ddqcli.inspection.layer_figures import PAGE, draw_layers, figure_folder
from ddqcli.inspection.result_sections import detail_sections, head_section
from ddqcli.inspection.run_figures import RunFigure, draw_bits, draw_run
from ddqcli.inspection.sweep_page import sections_of_sweep
from ddqcli.inspection.trained_rows import ERROR_NOTE, FITTED_NOTE, TrainedResult, TrainedRow
from ddqcli.runs.run import Run

KINDS = ("trained", "uniform", "power_of_two", "best")
HISTOGRAM_NOTES = {
    "run": "Bars: the float weights after finetuning, colored by the shape of their distribution. "
    "Lines: the levels in force, to which each weight is rounded. Layers of 8 bits show no lines: "
    "their 256 levels are a dense, even grid.",
    "artifact": "An exported file holds no float weights. Bars: the number of stored values at "
    "each level, or, where 256 levels are too dense to draw, in each bin.",
}
MAX_DRAWN_LEVELS = 128  # more would hide the histogram; at 8 bits they are an even grid


def write_trained_page(
    result: TrainedResult, out: Path, on_progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write PNG and SVG files and the page into `out`; return their paths, the page first.

    Raises DDQError if the folder cannot be written to or the run is damaged.
    """
    report = result.report
    with figure_folder(out) as folder:
        layers = [_layer(row) for row in result.layers]
        pictures = draw_layers(layers, {}, folder, on_progress)
        of_run = [
            folder.save(drawn.figure, drawn.stem, drawn.caption) for drawn in _figures(result)
        ]
        sections = [
            head_section(result.path, report),
            *(sections_of_sweep(result.path) if result.what == "run" else []),
            html.Section("Layers", _notes(result), _table(result)),
            html.Section("Pictures", pictures=of_run),
            html.Section(
                "Weights and their levels", [HISTOGRAM_NOTES[result.what]], pictures=pictures.layers
            ),
            *detail_sections(report),
        ]
        page = html.write_html(out / PAGE, f"Levels of {result.path.resolve().name}", sections)
    return page, *folder.files


def _figures(result: TrainedResult) -> list[RunFigure]:
    names = {row.name for row in result.layers}
    report = result.report
    rows = [row for row in report.layers if row.name in names]
    if result.what == "artifact":
        return [draw_bits(rows, "name")]
    return [draw_bits(rows), *draw_run(Run.open(result.path), rows, report.course, report.metric)]


def _layer(row: TrainedRow) -> plots.Layer:
    hide_levels = len(row.levels) > MAX_DRAWN_LEVELS
    counts_at_levels = row.distribution is None and bool(row.levels) and not hide_levels
    caption = "levels by channel are not drawn"
    if row.levels:
        caption = f"{len(row.levels)} levels in force ({row.bits:g} bits)"
    if hide_levels:
        caption += ": too dense to draw"
    if counts_at_levels:
        caption += ", and the number of weights at each"
    return plots.Layer(
        row.name,
        row.kind,
        row.distribution or "as stored",
        row.min,
        row.max,
        row.counts if counts_at_levels else row.histogram,
        () if hide_levels else row.levels,
        caption,
        learned=True,
        counts_at_levels=counts_at_levels,
    )


def _notes(result: TrainedResult) -> list[str]:
    return [ERROR_NOTE, FITTED_NOTE] if result.what == "run" else [ERROR_NOTE]


def _table(result: TrainedResult) -> html.Table:
    kinds = KINDS if result.what == "run" else KINDS[:1]
    header = ["layer", "kind", "shape", "distribution", "parameters", "bytes", "bits", "levels"]
    header += ["min", "max"]
    header += [f"error {kind.replace('power_of_two', 'pow2')}" for kind in kinds]
    rows = [
        [
            row.name,
            row.kind,
            "×".join(map(str, row.shape)),
            row.distribution or "",
            f"{row.parameters:,}",
            f"{row.bytes:,}",
            f"{row.bits:g}",
            str(len(row.levels) or ""),
            f"{row.min:.3g}",
            f"{row.max:.3g}",
            *("" if (error := row.error[kind]) is None else percent(error) for kind in kinds),
        ]
        for row in result.layers
    ]
    bars = {header.index("bits"): [row.bits / plots.MAX_BITS for row in result.layers]}
    return html.Table(header, rows, 4, bars)
