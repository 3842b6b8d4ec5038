"""The page of `ddq report --html`: the report and its figures in one file; without torch."""

from __future__ import annotations

from pathlib import Path

from ddqcli import plots
from ddqcli.inspection import html
from ddqcli.inspection.layer_figures import output_folder, page_file, page_picture
from ddqcli.inspection.result_sections import detail_sections, head_section
from ddqcli.inspection.run_figures import draw_bits, draw_run
from ddqcli.inspection.sweep_page import sections_of_sweep
from ddqcli.inspection.trained_rows import ERROR_NOTE, short_kind
from ddqcli.runs.report import Report
from ddqcli.runs.run import Run


def write_report_page(source: Path, report: Report, path: Path) -> Path:
    """Write the page of a run folder or an exported file `source`; return its path.

    That is `layer_figures.page_file(path)`. Raises DDQError if it cannot be written or the run is
    damaged.
    """
    page, is_run = page_file(path), source.is_dir()
    weights = [row for row in report.layers if row.kind != "bias"]
    figures = [draw_bits(weights, "network" if is_run else "name")]
    if is_run:
        figures += draw_run(Run.open(source), weights, report.course, report.metric)
    sections = [
        head_section(source, report),
        *(sections_of_sweep(source) if is_run else []),
        _layers(report),
        html.Section(
            "Pictures", pictures=[page_picture(drawn.figure, drawn.caption) for drawn in figures]
        ),
        *detail_sections(report),
    ]
    title = f"ddq report: {source.resolve().name}"
    with output_folder(page.parent):
        return html.write_html(page, title, sections, [] if is_run else [source])


def _layers(report: Report) -> html.Section:
    total = max(1, report.totals.quantized_bytes)
    largest = max([1, *(row.bytes for row in report.layers)])
    header = ["tensor", "kind", "shape", "bits", "levels"]
    header += ["float bytes", "bytes", "share, %", "error, %"]
    rows = [
        [
            row.name,
            short_kind(row.kind),
            "×".join(map(str, row.shape)),
            f"{row.bits:g}",
            str(row.levels),
            f"{row.float_bytes:,}",
            f"{row.bytes:,}",
            f"{100 * row.bytes / total:.1f}",
            f"{100 * row.error:.2f}",
        ]
        for row in report.layers
    ]
    bars = {
        3: [row.bits / plots.MAX_BITS for row in report.layers],
        7: [row.bytes / largest for row in report.layers],
    }
    text = [
        f"{ERROR_NOTE} Bars: bits, of {plots.MAX_BITS}, and bytes, of those of the largest tensor."
    ]
    return html.Section("Quantized tensors", text, html.Table(header, rows, 3, bars))
