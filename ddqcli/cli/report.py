"""`ddq report`: its command-line options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddqcli.cli.options import Json, Target, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.commands.diff import DiffResult
    from ddqcli.commands.report import ReportResult, SweepReport

EXAMPLES = examples(
    "ddq report",
    "ddq report model.safetensors --md >> $GITHUB_STEP_SUMMARY",
    "ddq report runs/20260131-150210-model --target 4",
    "ddq report --max-size 20kB --max-drop 0.5",
    "ddq report --html report.html",
    "ddq report --diff model.safetensors runs/20260131-142310-model",
)


def report(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_OR_FILE",
            help="Run folder, sweep or exported file; default: newest run or sweep.",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the layers as CSV.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write an HTML page with figures: FILE.html, or index.html in a folder.",
            show_default=False,
        ),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare two runs or exported files.", show_default=False),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Limit: maximum size of the exported file, e.g. 150kB or 12%."
        ),
    ] = None,
    max_bits: Annotated[
        float | None, typer.Option(help="Limit: maximum stored bits per quantized weight.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Limit: maximum drop of accuracy in points, or of the run's metric."),
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Limit: minimum accuracy, percent.")
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option(
            "--min", metavar="METRIC=F", help="Limit: minimum of the run's metric, in its unit."
        ),
    ] = None,
    most: Annotated[
        list[str] | None,
        typer.Option(
            "--max", metavar="METRIC=F", help="Limit: maximum of the run's metric, in its unit."
        ),
    ] = None,
) -> None:
    """Show the bits, size and error of each tensor.

    Prints each tensor's bits, levels, bytes and quantization error, and the totals; of a sweep,
    each target's bytes and accuracy. An exceeded limit ends with exit code 3.
    """

    def work() -> ReportResult | SweepReport | DiffResult:
        from ddqcli.commands.report import Limits, ReportResult, SweepReport
        from ddqcli.commands.report import report as command
        from ddqcli.errors import UsageError

        if as_json + as_csv + as_md > 1:
            raise UsageError("--json, --csv and --md exclude each other; give one.")
        limits = Limits(
            max_size,
            max_bits,
            max_drop,
            min_accuracy,
            least=tuple(_metric_limit("--min", text) for text in least or ()),
            most=tuple(_metric_limit("--max", text) for text in most or ()),
        )
        if diff:
            if source or target or html or limits != Limits():
                raise UsageError(
                    "--diff compares A and B; omit RUN_OR_FILE, --target, --html and all limits."
                )
            from ddqcli.commands.diff import diff as compare

            return compare(*diff)
        result = command(source, limits, target=target)
        if html and isinstance(result, ReportResult):
            from ddqcli.inspection.report_page import write_report_page

            return replace(result, page=write_report_page(result.source, result.report, html))
        if html and isinstance(result, SweepReport):
            from ddqcli.inspection.sweep_page import write_sweep_page

            return replace(result, page=write_sweep_page(result.source, result.table, html))
        return result

    def show(result: ReportResult | SweepReport | DiffResult) -> None:
        from ddqcli.commands.report import ReportResult, SweepReport
        from ddqcli.render import console, diff, report, sweep

        tables: Any = diff
        content: Any = result
        if isinstance(result, ReportResult):
            tables, content = report, result.report
        elif isinstance(result, SweepReport):
            tables, content = sweep, result.table
        if as_csv:
            console.print_plain(tables.as_csv(content))
        elif as_md:
            console.print_plain(tables.as_markdown(content))
        else:
            tables.show(content, console.out)
            for line in _closing_lines(result):
                console.out.print(line, markup=False, soft_wrap=True)

    run_command("report", work, show, as_json)


def _closing_lines(result: ReportResult | SweepReport | DiffResult) -> list[str]:
    """Name the source, the page, and what to type next."""
    from ddqcli.commands.report import ReportResult, SweepReport
    from ddqcli.render.console import sizes_lines
    from ddqcli.render.sweep import next_lines

    if not isinstance(result, ReportResult | SweepReport):
        return []
    page = [f"page       {result.page}"] if result.page else []
    sizes = sizes_lines(result.file_format)
    if isinstance(result, SweepReport):
        following = next_lines(result.source, result.table, result.file_format)
        return [*sizes, f"runs       {result.source}", *page, *following]
    return [*sizes, f"{'run' if result.source.is_dir() else 'file':<10} {result.source}", *page]


def _metric_limit(flag: str, text: str) -> tuple[str, float]:
    """Return name and value of `NAME=VALUE`. Raises UsageError for other text."""
    from ddqcli.errors import UsageError

    name, _, value = text.rpartition("=")
    try:
        if not name:
            raise ValueError
        return name.strip(), float(value)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: give a metric and a number, as in mAP=0.31.") from error
