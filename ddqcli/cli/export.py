"""`ddq export`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddqcli.cli.options import Json, Quiet, Target, Trust, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.commands.export import ExportResult
    from ddqcli.commands.export_onnx import OnnxResult

EXAMPLES = examples(
    "ddq export",
    "ddq export runs/20260131-142310-model -o small.safetensors --half",
    "ddq export --format onnx --bench",
    "ddq export --check small.safetensors",
)


def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="Run folder or sweep; default: newest run.", show_default=False
        ),
    ] = None,
    target: Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Output file.  [default: model.safetensors or model.onnx in the run folder]",
            show_default=False,
        ),
    ] = None,
    file_format: Annotated[
        Literal["ddq", "onnx"],
        typer.Option("--format", help="ddq: smallest file; onnx: int8 graph for onnxruntime."),
    ] = "ddq",
    half: Annotated[
        bool,
        typer.Option("--half", help="Store float tensors as float16 and report the difference."),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Verify an exported file of the run; write nothing.",
            show_default=False,
        ),
    ] = None,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench", help="Time an ONNX file beside the float model on this machine, by layer."
        ),
    ] = False,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="Verify an ONNX file in OpenVINO, too.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's model as one verified file.

    Reads the file back and compares it with the trained model: every bit, the outputs and the
    accuracy. A mismatch ends with exit code 4. Outputs need the code of the network: it runs if
    this machine made the run, or with --trust.
    """

    def work() -> ExportResult | OnnxResult:
        from ddqcli.commands import export as ddq
        from ddqcli.commands import export_onnx as onnx
        from ddqcli.errors import UsageError
        from ddqcli.render.progress import ProgressReporter
        from ddqcli.runs.find import find_finished

        use_onnx = file_format == "onnx" or (check is not None and check.suffix == ".onnx")
        if check is not None and (out or half):
            raise UsageError("--check writes nothing; omit --out and --half.")
        if use_onnx and half:
            raise UsageError("--half applies to the ddq format; an ONNX file keeps float32.")
        if (bench or openvino) and not use_onnx:
            raise UsageError("--bench and --openvino run an ONNX file; add --format onnx.")
        folder = find_finished(run, target) if target is not None else run
        with ProgressReporter(quiet=quiet) as reporter:
            progress = reporter.progress
            if use_onnx and check is not None:
                return onnx.check_onnx(
                    check, folder, timed=bench, openvino=openvino, trust=trust, on_progress=progress
                )
            if use_onnx:
                return onnx.export_onnx(
                    folder, out, timed=bench, openvino=openvino, trust=trust, on_progress=progress
                )
            if check is not None:
                return ddq.check(check, folder, trust=trust, on_progress=progress)
            return ddq.export(folder, out, half=half, trust=trust, on_progress=progress)

    run_command("export", work, _show, as_json)


def _show(result: ExportResult | OnnxResult) -> None:
    from ddqcli.render import console, export

    export.show(result, console.out)
