"""The closing lines of `ddq export`: where the bytes went, and what was compared."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddqcli.commands.export import ExportResult
from ddqcli.commands.export_c import CResult
from ddqcli.commands.export_coreml import CoreMLResult
from ddqcli.commands.export_int8 import Int8Result
from ddqcli.commands.export_onnx import OnnxResult
from ddqcli.render.console import print_lines
from ddqcli.render.report import size_line

if TYPE_CHECKING:
    from ddqcli.onnx.bench import Bench
    from ddqcli.onnx.runtime import Comparison
    from ddqcli.runs.evaluation import Metric

_MOST_LAYERS = 5  # that are listed as slower than in float
_PARTS = ("indices", "levels", "scales", "gates", "floats", "manifest", "header", "file")


def show(
    result: ExportResult | OnnxResult | Int8Result | CoreMLResult | CResult, console: Console
) -> None:
    """Print what was written, or checked."""
    if isinstance(result, OnnxResult):
        file_bytes, lines = result.size, _onnx_lines(result)
    elif isinstance(result, Int8Result):
        file_bytes, lines = result.size, _int8_lines(result)
    elif isinstance(result, CoreMLResult):
        file_bytes, lines = result.size, _coreml_lines(result)
    elif isinstance(result, CResult):
        console.print(_flash_table(result))
        console.print()
        file_bytes, lines = result.flash, _c_lines(result)
    else:
        console.print(_size_table(result))
        console.print()
        file_bytes, lines = result.sizes.file, _lines(result)
    names = [f"run        {result.run_dir}", f"file       {result.path}"]
    if count := len(result.warnings):
        report = f"`ddq report {shlex.quote(str(result.run_dir))}`"
        warnings = "1 warning" if count == 1 else f"{count} warnings"
        names.append(f"warning    the run ended with {warnings}; {report} shows them")
    print_lines([size_line(result.float_bytes, file_bytes), *lines, *names], console)


def _size_table(result: ExportResult) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="right")
    for part in _PARTS:
        nbytes = getattr(result.sizes, part)
        share = f"{100 * nbytes / result.sizes.file:.1f}%"
        table.add_row(part, f"{nbytes:,}", share, style="bold" if part == "file" else "")
    return table


def _coreml_lines(result: CoreMLResult) -> list[str]:
    rounded = ", rounded to float16," if result.half else ""
    lines = [
        f"bits       tables{rounded} and indices of {len(result.layers)} weights, "
        f"{result.values:,} values, read back as trained"
    ]
    if wider := [row for row in result.layers if row.stored_bits > row.bits]:
        lines.append(
            f"stored     {len(wider)} weights with more bits than trained: Core ML has no 5 and 7"
        )
    return lines + [f"unchecked  {reason}" for reason in result.unchecked]


def _flash_table(result: CResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for name in ("bits", "flash"):
        table.add_column(name, justify="right")
    for row in result.layers:
        table.add_row(Text(row.name), f"{row.bits:.4g}", f"{row.bytes:,}")
    table.add_row("all", "", f"{result.flash:,}", style="bold")
    return table


def _c_lines(result: CResult) -> list[str]:
    compiled = f", and as compiled by {result.compiler}" if result.compiler else ""
    return [
        f"bits       all {result.values:,} values of {result.tensors} tensors read back as trained"
        + compiled,
        "yours      layer order and geometry, activations, pooling, additions, BatchNorm's y = x * "
        f"weight + bias; see the top of {result.path.name}",
        *(f"unchecked  {reason}" for reason in result.unchecked),
    ]


def _lines(result: ExportResult) -> list[str]:
    behavior = result.behavior
    rounded = ", unquantized tensors rounded to float16," if result.half else ""
    lines = [
        f"bits       all {result.values:,} values of {result.tensors} tensors{rounded} "
        "read back as trained"
    ]
    if behavior.outputs is not None:
        difference = f"{behavior.outputs:.1e} from the trained network's"
        same = "the same bits as the trained network's"
        lines.append(f"outputs    {same if behavior.outputs == 0 else difference}")
    if behavior.accuracy is not None and behavior.expected is not None:
        metric, change = result.metric, behavior.accuracy - behavior.expected
        points = "points" if metric.unit == "%" else metric.unit
        unchanged = abs(change) < 1e-4 * metric.scale / 100
        distance = "as reported" if unchanged else f"{change:+.4f} {points} from the report's"
        lines.append(f"{metric.name:<10} {metric.text(behavior.accuracy)}, {distance}")
    return lines + [f"unchecked  {reason}" for reason in behavior.unchecked]


def _onnx_lines(result: OnnxResult) -> list[str]:
    lines = [
        f"bits       all {result.values:,} weights of {result.tensors} tensors are unpacked as "
        "trained"
    ]
    for comparison, runtime in (
        (result.optimized, "onnxruntime"),
        (result.unoptimized, "onnxruntime without optimizations"),
        (result.openvino, "OpenVINO"),
    ):
        if comparison is not None:
            lines.append(_outputs_line(comparison, runtime, result.metric))
    lines += [f"unchecked  {reason}" for reason in result.unchecked]
    return lines if result.bench is None else lines + _bench_lines(result.bench)


def _outputs_line(comparison: Comparison, runtime: str, metric: Metric) -> str:
    line = (
        f"outputs    {runtime}: {comparison.outputs:.1e} from torch's on "
        f"{comparison.samples:,} samples"
    )
    if comparison.accuracy is None or comparison.torch_accuracy is None:
        return line
    ours = f"torch {metric.text(comparison.torch_accuracy)}"
    return f"{line}, {metric.name} {metric.text(comparison.accuracy)} ({ours})"


def _int8_lines(result: Int8Result) -> list[str]:
    lines = [
        f"bits       all {result.values:,} weights of {len(result.layers)} tensors are in the file "
        "as int8",
        f"stored     one byte a weight: {result.runtime} has no tables of fewer bits",
        f"takes      {result.takes}",
    ]
    if rounded := [row for row in result.layers if row.rounded]:
        count = sum(row.rounded for row in rounded)
        lines.append(
            f"rounded    {count:,} weights of {len(rounded)} tensors: their levels reach beyond "
            "-127 to 127, which is all that int8 around 0 has"
        )
    if result.floats:
        lines.append(f"float      four bytes a weight: {', '.join(result.floats)}")
    lines.append(_outputs_line(result.compared, result.runtime, result.metric))
    if result.steps is not None:
        steps = "1 grid step" if round(result.steps) == 1 else f"{result.steps:.0f} grid steps"
        lines.append(f"steps      outputs differ from torch's int8 graph by at most {steps}")
    return lines + [f"unchecked  {reason}" for reason in result.unchecked]


def _bench_lines(bench: Bench) -> list[str]:
    runtime = "OpenVINO, " if bench.runtime == "openvino" else ""
    threads = f"{runtime}{bench.threads} thread{'s' * (bench.threads > 1)}"
    lines = [
        f"bench      float {bench.float_ms:.3g} -> {bench.quantized_ms:.3g} ms a sample, "
        f"{bench.speedup:.2f} times as fast ({threads}, median of {bench.runs} paired runs)"
    ]
    lines += [
        f"slower     {layer.name}: float {layer.float_ms:.3g} -> {layer.quantized_ms:.3g} ms"
        for layer in bench.layers[:_MOST_LAYERS]
    ]
    if (more := len(bench.layers) - _MOST_LAYERS) > 0:
        lines.append(f"slower     {more} more layers than in float; --json lists them")
    return lines
