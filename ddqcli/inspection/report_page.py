"""The page of `ddq report --html`: the report and its figures in one file; without torch."""

from __future__ import annotations

from pathlib import Path

from ddqcli import plots
from ddqcli.inspection import html
from ddqcli.inspection.layer_figures import PAGE, output_folder
from ddqcli.inspection.run_figures import FigureGroup, draw_bits, draw_run
from ddqcli.inspection.trained_rows import ERROR_NOTE
from ddqcli.runs.report import Report
from ddqcli.runs.run import Run


def write_report_page(source: Path, report: Report, path: Path) -> Path:
    """Write the page of a run folder or an exported file `source`; return its path.

    The page becomes `path` if that ends in .html or .htm and is no folder, else index.html in it.
    Raises DDQError if it cannot be written or the run is damaged.
    """
    page = path if path.suffix in {".html", ".htm"} and not path.is_dir() else path / PAGE
    weights = [row for row in report.layers if row.kind != "bias"]
    if source.is_dir():
        groups = [
            draw_bits(weights),
            *draw_run(Run.open(source), weights, report.course, report.metric),
        ]
    else:
        groups = [draw_bits(weights, "name")]
    sections = [_result(source, report), *map(_figures, groups), _layers(report)]
    title = f"ddq report: {source.resolve().name}"
    with output_folder(page.parent):
        return html.write_html(page, title, sections, [] if source.is_dir() else [source])


def _figures(group: FigureGroup) -> html.Section:
    pictures = [plots.for_page(plots.svg_of(figure)) for figure in group.figures.values()]
    return html.Section(group.title, [group.text], pictures=pictures)


def _result(source: Path, report: Report) -> html.Section:
    totals, accuracy, course, metric = report.totals, report.accuracy, report.course, report.metric
    rows = [
        ["bytes", f"{totals.float_bytes:,}", f"{totals.bytes:,}"],
        ["not quantized", "", f"{totals.kept_bytes:,}"],
        ["manifest and header", "", f"{totals.manifest_bytes:,}"],
        ["stored bits a weight", "", f"{totals.average_bits:.3f}"],
    ]
    if accuracy:
        values = (metric.text(v, " ") for v in (accuracy.float, accuracy.quantized))
        rows.append([metric.name, *values])
    text = [
        f"{source}: {report.source.path} ({report.source.arch}), {report.run.steps:,} steps, "
        f"seed {report.run.seed}, {totals.float_bytes / max(1, totals.bytes):.1f} times smaller."
    ]
    if (budget := totals.budget_bytes) is not None:
        text.append(f"Budget: {budget:,} bytes, {100 * totals.bytes / budget:.1f} % used.")
    if report.activations:
        bits = "/".join(map(str, sorted({row.bits for row in report.activations})))
        text.append(f"Inputs of {len(report.activations)} layers are quantized to {bits} bits.")
    if course:
        text.append(f"{metric.title}: {course.path(metric, '→', ' ')}.")
        text.append(f"Delivered: {course.outcome(report.run.steps, metric)}.")
    text += [f"Warning: {warning}." for warning in report.warnings]
    return html.Section("Result", text, html.Table(["", "float", "delivered"], rows))


def _layers(report: Report) -> html.Section:
    total = max(1, report.totals.quantized_bytes)
    header = ["tensor", "kind", "shape", "bits", "levels"]
    header += ["float bytes", "bytes", "share, %", "error, %"]
    rows = [
        [
            row.name,
            row.kind,
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
    return html.Section("Quantized tensors", [ERROR_NOTE], html.Table(header, rows, text=3))
