"""The size-accuracy curve of a sweep, on its own page and on those of its runs."""

from __future__ import annotations

from pathlib import Path

from ddqcli import plots
from ddqcli.errors import DDQError
from ddqcli.inspection.html import Section, Table, write_html
from ddqcli.inspection.layer_figures import output_folder, page_file, page_picture
from ddqcli.runs.report import SweepTable
from ddqcli.runs.run import Run


def write_sweep_page(folder: Path, table: SweepTable, path: Path) -> Path:
    """Write the page of a sweep; return its path, which is that of `page_file`.

    Raises DDQError if it cannot be written.
    """
    page, title = page_file(path), f"ddq report: {folder.resolve().name}"
    head = Section("", [f"{folder}: {table.source.path} ({table.source.arch})."])
    rows = [(row.target, warning) for row in table.targets for warning in row.warnings]
    warnings = Section("Warnings", warnings=[f"{target}: {warning}" for target, warning in rows])
    with output_folder(page.parent):
        sections = [head, sweep_section(table), *([warnings] if rows else [])]
        return write_html(page, title, sections)


def sections_of_sweep(run: Path) -> list[Section]:
    """Return the section of the finished sweep that a run folder belongs to, if there is one."""
    run = run.resolve()
    try:
        table = Run(run.parent).sweep_table()
    except DDQError:  # there is none, or it is damaged; the run has a page all the same
        return []
    this = next((row.target for row in table.targets if row.run == run.name), None)
    return [sweep_section(table, this)] if this else []


def sweep_section(table: SweepTable, this: str | None = None) -> Section:
    """Return the curve and the table of a sweep, with the target `this` marked."""
    metric, float_model = table.metric, table.float
    nan = float("nan")
    points = [
        (row.bytes, nan if row.accuracy is None else row.accuracy, row.target)
        for row in table.targets
    ]
    stored = None if float_model.accuracy is None else (float_model.bytes, float_model.accuracy)
    figure = plots.size_against_accuracy_figure({"quantized": points}, stored, metric.label, this)
    header = ["target", "bytes", "ratio", "bits a weight", metric.name, "drop"]
    value = "" if float_model.accuracy is None else metric.text(float_model.accuracy, " ")
    rows = [["float", f"{float_model.bytes:,}", "", "", value, ""]]
    for row in table.targets:
        rows.append(
            [
                row.target + " (this run)" * (row.target == this),
                f"{row.bytes:,}",
                f"{float_model.bytes / max(1, row.bytes):.1f}x",
                f"{row.average_bits:.3f}",
                "" if row.accuracy is None else metric.text(row.accuracy, " "),
                "" if row.drop is None else metric.text(row.drop).rstrip("%"),
            ]
        )
    return Section(
        f"Size against {metric.name}",
        table=Table(header, rows),
        pictures=[page_picture(figure, "Each point is a target of the sweep.")],
    )
