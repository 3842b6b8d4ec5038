"""`ddq export`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddqcli.cli.options import Json, Quiet, Target, Trust, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.commands.export import ExportResult
    from ddqcli.commands.export_c import CResult
    from ddqcli.commands.export_coreml import CoreMLResult
    from ddqcli.commands.export_int8 import Int8Result
    from ddqcli.commands.export_onnx import OnnxResult

    Result = ExportResult | OnnxResult | Int8Result | CoreMLResult | CResult

Format = Literal["safetensors", "onnx", "tflite", "pte", "coreml", "c"]
_FORMAT_OF: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".tflite": "tflite",
    ".pte": "pte",
    ".mlpackage": "coreml",
    ".h": "c",
}

EXAMPLES = examples(
    "ddq export",
    "ddq export runs/20260131-142310-model -o small.safetensors --half",
    "ddq export --format onnx --bench",
    "ddq export --format c -o model.h",
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
            help="Output file.  [default: model.safetensors, .onnx, .tflite, .pte, .mlpackage or "
            ".h in the run folder]",
            show_default=False,
        ),
    ] = None,
    file_format: Annotated[
        Format,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="safetensors: smallest file; onnx: int8 graph for onnxruntime; tflite: int8 for "
            "LiteRT; pte: int8 for ExecuTorch; coreml: palettes for Apple's systems; c: C99 "
            "header, no runtime.",
        ),
    ] = "safetensors",
    half: Annotated[
        bool,
        typer.Option(
            "--half",
            help="Store float tensors as float16 and report the difference; coreml computes in it.",
        ),
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
        bool,
        typer.Option(
            "--openvino", help="Make an ONNX file that is fast in OpenVINO; verify it there, too."
        ),
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

    def work() -> Result:
        from ddqcli.errors import UsageError
        from ddqcli.runs.files import check_output
        from ddqcli.runs.find import find_finished
        from ddqcli.runs.run import Run

        chosen = file_format
        if check is not None and file_format == "safetensors":
            chosen = _FORMAT_OF.get(check.suffix, "safetensors")
        if check is not None and (out or half):
            raise UsageError("--check writes nothing; omit --out and --half.")
        if out is not None and (named := _FORMAT_OF.get(out.suffix, chosen)) != chosen:
            raise UsageError(
                f"{out} is named like a file of --format {named}, and the format is {chosen}; give "
                "the option, or another name."
            )
        if half and chosen not in ("safetensors", "coreml"):
            raise UsageError(f"--half applies to safetensors and coreml; {chosen} keeps float32.")
        if (bench or openvino) and chosen != "onnx":
            raise UsageError("--bench and --openvino run an ONNX file; add --format onnx.")
        if check is not None and chosen in ("tflite", "pte", "coreml"):
            raise UsageError(
                f"A file of --format {chosen} is verified when it is written; export it again."
            )
        folder = find_finished(run, target) if target is not None else run
        if out is not None and chosen != "coreml":
            check_output(out, Run.open(folder).inputs())
        # These import torch, so that wrong options are refused before.
        from ddqcli.commands import export as safetensors
        from ddqcli.commands import export_c as c
        from ddqcli.commands import export_coreml as coreml
        from ddqcli.commands import export_int8 as int8
        from ddqcli.commands import export_onnx as onnx
        from ddqcli.render.progress import ProgressReporter

        if chosen == "coreml":
            return coreml.export_coreml(folder, out, half=half, trust=trust)
        if chosen == "c":
            return c.export_c(folder, out) if check is None else c.check_c(check, folder)
        with ProgressReporter(quiet=quiet) as reporter:
            progress = reporter.progress
            if chosen == "onnx" and check is not None:
                return onnx.check_onnx(
                    check, folder, timed=bench, openvino=openvino, trust=trust, on_progress=progress
                )
            if chosen == "onnx":
                return onnx.export_onnx(
                    folder, out, timed=bench, openvino=openvino, trust=trust, on_progress=progress
                )
            if chosen in ("tflite", "pte"):
                return int8.export_int8(chosen, folder, out, trust=trust, on_progress=progress)
            if check is not None:
                return safetensors.check(check, folder, trust=trust, on_progress=progress)
            return safetensors.export(folder, out, half=half, trust=trust, on_progress=progress)

    run_command("export", work, _show, as_json)


def _show(result: Result) -> None:
    from ddqcli.render import console, export

    export.show(result, console.out)
