"""`ddq export --format onnx`: a finished run as an ONNX file, run by onnxruntime beside the torch model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddqcli.commands.export import Frozen
from ddqcli.commands.verify import attempt, held_out, rebuilt
from ddqcli.data.load import Data
from ddqcli.errors import UsageError, VerificationError
from ddqcli.onnx.export import require_onnx, write_onnx
from ddqcli.onnx.runtime import Comparison, compare
from ddqcli.qat.load import to_torch
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import FINAL, REPORT, Run
from ddqcli.training.evaluate import OnProgress

ONNX = "model.onnx"
_UNOPTIMISED = 1000  # samples for onnxruntime without its optimisations, which takes long

# onnxruntime sums in another order, and the shifts of convolutions are rounded to whole numbers (see engine.qdq), so now and
# then a value on the edge between two levels of an input takes the other one; the network then goes on from there.
SAME_OUTPUTS = {
    False: 1e-3,
    True: 0.1,
}  # of a typical sample, as a share of the outputs; True: with quantized inputs
SAME_ACCURACY = 0.5  # points, and
_HITS = 2  # samples


@dataclass(frozen=True)
class OnnxResult:
    """A written ONNX file, and how onnxruntime's answers compare with torch's."""

    run_dir: Path
    path: Path
    size: int  # bytes
    float_bytes: int
    optimised: Comparison
    unoptimised: Comparison
    unchecked: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run_dir), "path": str(self.path), "format": "onnx", "float_bytes": self.float_bytes,
            "sizes": {"file": self.size}, "optimised": asdict(self.optimised), "unoptimised": asdict(self.unoptimised),
            "unchecked": list(self.unchecked),
        }  # fmt: skip


@dataclass(frozen=True)
class _Reference:
    """The torch model of a run, and what to compare with."""

    model: nn.Module
    data: Data | None
    example: Tensor  # some samples
    quantized_inputs: bool
    unchecked: tuple[str, ...]

    def batches(self, on_progress: OnProgress | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The held-out data, or else the example without targets."""
        if self.data is None:
            yield self.example.to(next(self.model.parameters()).device), None
            return
        for done, batch in enumerate(self.data.val.epoch(0)):
            yield batch
            if on_progress:
                on_progress("onnxruntime", done + 1, len(self.data.val))


def export_onnx(
    run_dir: Path | None = None, out: Path | None = None, *, on_progress: OnProgress | None = None
) -> OnnxResult:
    """Write the run's model to `out` (default: model.onnx in the run folder) and run it.

    Raises UsageError for what ONNX cannot express, and VerificationError if onnxruntime, with or without its
    optimisations, does not answer as torch does; the file is then not written.
    """
    require_onnx()
    run = Run.open(run_dir)
    path, frozen, report = out or run.path / ONNX, Frozen.of(run), run.report()
    reference = _reference(run, frozen)
    about = {"ddq": report["source"]["ddq"], "source": report["source"]["sha256"]}
    compared = []

    def write(temporary: Path) -> None:
        write_onnx(temporary, reference.model, frozen.weights(), reference.example, about)
        compared.extend(_compared(temporary, path, reference, on_progress))

    write_atomic(path, write)  # what does not answer as trained never gets its name
    return _result(run, path, compared, reference)


def check_onnx(
    file: Path, run_dir: Path | None = None, *, on_progress: OnProgress | None = None
) -> OnnxResult:
    """Verify an ONNX file found later against the run it came from: `run_dir`, or the folder it lies in, or the newest."""
    require_onnx()
    if not file.is_file():
        raise UsageError(f"There is no file {file}.")
    run = Run.open(run_dir or (file.parent if (file.parent / REPORT).is_file() else None))
    reference = _reference(run, Frozen.of(run))
    return _result(run, file, _compared(file, file, reference, on_progress), reference)


def _reference(run: Run, frozen: Frozen) -> _Reference:
    tables = {table.name: table for table in frozen.activations}
    tensors = {name: value for name, value in frozen.expected().items() if name not in tables}
    model = rebuilt(run, to_torch(tensors), tables, str(run.path))
    data, reason = attempt(lambda: held_out(run))
    probe = run.load(FINAL).get("probe")
    if data is None and probe is None:
        raise UsageError(f"ONNX export needs an input to follow, and the run holds none: {reason}")
    example = probe["input"] if probe else next(iter(data.val.epoch(0)))[0][:8]
    unchecked = (
        (f"compared on the {len(example)} samples that the run holds: {reason}",)
        if data is None
        else ()
    )
    return _Reference(model, data, example, bool(tables), unchecked)


def _compared(
    file: Path, name: Path, reference: _Reference, on_progress: OnProgress | None
) -> list[Comparison]:
    """With and without onnxruntime's optimisations. Raises VerificationError, which calls the file `name`."""
    found = []
    for optimised, most in ((True, None), (False, _UNOPTIMISED)):
        metric = reference.data.metric if reference.data else None
        batches = reference.batches(on_progress)
        found.append(
            compare(file, reference.model, batches, metric, optimised=optimised, most=most)
        )
        _judge(
            found[-1],
            name,
            reference.quantized_inputs,
            "" if optimised else ", its optimisations switched off,",
        )
    return found


def _judge(found: Comparison, name: Path, quantized_inputs: bool, how: str) -> None:
    if not found.outputs <= SAME_OUTPUTS[quantized_inputs]:
        raise VerificationError(
            f"onnxruntime{how} does not answer as torch does for {name}: outputs differ by {found.outputs:.1%}."
        )
    if found.accuracy is None or found.torch_accuracy is None:
        return
    if abs(found.accuracy - found.torch_accuracy) > SAME_ACCURACY + 100 * _HITS / found.samples:
        raise VerificationError(
            f"onnxruntime{how} reaches {found.accuracy:.2f} % with {name}, where torch reaches {found.torch_accuracy:.2f} %."
        )


def _result(run: Run, path: Path, compared: list[Comparison], reference: _Reference) -> OnnxResult:
    float_bytes = run.report()["totals"]["float_bytes"]
    return OnnxResult(
        run.path, path, path.stat().st_size, float_bytes, *compared, reference.unchecked
    )
