"""`ddq export --format onnx`: a finished run as an ONNX file, run in onnxruntime beside torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddqcli.commands.beside_torch import Reference, compare_with, reference_of
from ddqcli.commands.exported import Exported, require_file, run_of
from ddqcli.data.trees import input_names, sliced, tensors
from ddqcli.errors import LimitExceeded
from ddqcli.onnx.export import OnnxModel, Runtime, make_float_onnx, make_onnx, require_onnx
from ddqcli.onnx.openvino import openvino_answers, require_openvino
from ddqcli.onnx.runtime import Comparison, onnxruntime_answers
from ddqcli.qat.frozen import FrozenModel
from ddqcli.recipe.size import parse_size
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import FINAL, Run
from ddqcli.training.evaluate import OnProgress

if TYPE_CHECKING:
    from ddqcli.onnx.bench import Bench

ONNX = "model.onnx"
_FEW_SAMPLES = 1000  # for what is slow: onnxruntime without its optimizations, and OpenVINO


@dataclass(frozen=True)
class OnnxResult(Exported):
    """A written ONNX file, and how onnxruntime's answers compare with torch's."""

    size: int  # bytes
    tensors: int  # compared bit for bit
    values: int  # of these tensors
    metric: Metric  # of the accuracies in both comparisons
    optimized: Comparison
    unoptimized: Comparison
    openvino: Comparison | None
    bench: Bench | None
    unchecked: tuple[str, ...]  # reasons why something was not compared

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            **self.first_data("onnx"),
            "sizes": {"file": self.size},
            "verified": {"tensors": self.tensors, "values": self.values},
            # Scripts read these two keys: their British spelling is frozen.
            "optimised": asdict(self.optimized),
            "unoptimised": asdict(self.unoptimized),
            "openvino": None if self.openvino is None else asdict(self.openvino),
            "unchecked": list(self.unchecked),
            "bench": None if self.bench is None else asdict(self.bench),
        }


def export_onnx(
    run_dir: Path | None = None,
    out: Path | None = None,
    *,
    timed: bool = False,
    openvino: bool = False,
    trust: bool = False,
    on_progress: OnProgress | None = None,
) -> OnnxResult:
    """Write the run's model to `out` (default: model.onnx in the run folder) and run it.

    The network's code runs under the rule of `ddqcli.runs.trust`, which `trust` overrides. `timed`
    compares the file's latency with the float model's. `openvino` writes the file so that it is
    fast there, and runs it there, too. Raises
    UsageError for what ONNX cannot express, and VerificationError if onnxruntime unpacks other
    weights or, with or without its optimizations, does not answer as torch does. The file is then
    not written.
    """
    require_onnx()
    if openvino:
        require_openvino()
    run = Run.open(run_dir, trust=trust)
    path = out or run.path / ONNX
    results: list[OnnxResult] = []
    with run.held():
        expected = _expected(run, "openvino" if openvino else "onnxruntime")

        def write(temporary: Path) -> None:
            _require_target(run, len(expected.model.raw), path)
            temporary.write_bytes(expected.model.raw)
            results.append(_verified(run, temporary, path, expected, timed, openvino, on_progress))

        # A file that does not answer as trained never gets its name.
        write_atomic(path, write, inputs=run.inputs())
    return results[0]


def check_onnx(
    file: Path,
    run_dir: Path | None = None,
    *,
    timed: bool = False,
    openvino: bool = False,
    trust: bool = False,
    on_progress: OnProgress | None = None,
) -> OnnxResult:
    """Verify an existing ONNX file against its run.

    The run is `run_dir`, or else the folder of the file, or else the newest run. Raises as
    `export_onnx`.
    """
    require_onnx()
    if openvino:
        require_openvino()
    from ddqcli.onnx.seal import opened, properties

    require_file(file)
    # Damage is found before the work of exporting again.
    about = properties(opened(file.read_bytes(), str(file)))
    runtime: Runtime = "openvino" if about.get("runtime") == "openvino" else "onnxruntime"
    run = run_of(file, run_dir, trust=trust)
    with run.held():
        return _verified(run, file, file, _expected(run, runtime), timed, openvino, on_progress)


def _require_target(run: Run, size: int, path: Path) -> None:
    """Raise LimitExceeded if the run promised a smaller ONNX file."""
    budget = run.recipe().budget
    if budget.target_format != "onnx" or budget.target_size is None:
        return
    limit = parse_size(budget.target_size, run.report().totals.float_bytes)
    if size > limit:
        raise LimitExceeded(
            f"{path} would have {size:,} bytes, and the budget of the run is {limit:,} "
            f"({budget.target_size}); finetune with a smaller --target-size."
        )


@dataclass(frozen=True)
class _Expected:
    """The exported model of a run, and the torch model to compare it with."""

    model: OnnxModel
    reference: Reference


def _expected(run: Run, runtime: Runtime) -> _Expected:
    frozen, source = FrozenModel.from_state(run.load(FINAL)), run.report().source
    reference = reference_of(run, frozen, "ONNX")
    about = {"ddq": source.ddq, "source": source.sha256}
    model = make_onnx(reference.model, frozen.weights(), reference.example, about, runtime)
    return _Expected(model, reference)


def _verified(
    run: Run,
    file: Path,
    name: Path,
    expected: _Expected,
    timed: bool,
    openvino: bool,
    on_progress: OnProgress | None,
) -> OnnxResult:
    """Read the file back bit for bit, run it, and time it. Errors call it `name`."""
    from ddqcli.onnx.readback import require_same_model

    raw, reference = file.read_bytes(), expected.reference
    unchecked = require_same_model(raw, expected.model, name)
    compared = partial(compare_with, reference, name=name, on_progress=on_progress)
    optimized = compared(onnxruntime_answers(file, optimized=True), "onnxruntime")
    unoptimized = compared(
        onnxruntime_answers(file, optimized=False),
        "onnxruntime, without its optimizations,",
        max_samples=_FEW_SAMPLES,
    )
    in_openvino = None
    if openvino:
        in_openvino = compared(openvino_answers(file), "OpenVINO", max_samples=_FEW_SAMPLES)
    stored = expected.model.unpacked.values()
    return OnnxResult(
        run_dir=run.path,
        warnings=run.report().warnings,
        path=name,
        size=len(raw),
        float_bytes=run.report().totals.float_bytes,
        metric=reference.metric,
        tensors=len(stored),
        values=sum(array.size for array in stored),
        optimized=optimized,
        unoptimized=unoptimized,
        openvino=in_openvino,
        bench=_bench(raw, reference, openvino) if timed else None,
        unchecked=reference.unchecked + unchecked,
    )


def _bench(raw: bytes, reference: Reference, openvino: bool) -> Bench:
    from ddqcli.onnx.bench import bench, bench_openvino

    float_file = make_float_onnx(reference.model, reference.example)
    sample = sliced(reference.example, slice(1))
    arrays = [value.cpu().contiguous().numpy() for value in tensors(sample)]
    feed = dict(zip(input_names(sample), arrays, strict=True))
    return (bench_openvino if openvino else bench)(float_file, raw, feed)
