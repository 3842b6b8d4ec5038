"""`ddq export --format tflite` and `pte`: a finished run in int8 for LiteRT and ExecuTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddqcli.commands.beside_torch import Reference, compare_with, reference_of
from ddqcli.commands.exported import Exported
from ddqcli.errors import VerificationError
from ddqcli.onnx.runtime import Comparison
from ddqcli.pt2e.executorch import EXECUTORCH
from ddqcli.pt2e.graph import Int8Model, make_int8, one_by_one, require_int8_inputs
from ddqcli.pt2e.integers import Symmetric
from ddqcli.pt2e.litert import LITERT
from ddqcli.pt2e.runtime import Int8Format, Int8Runtime, OneAnswer, sample_by_sample
from ddqcli.qat.frozen import FrozenModel
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import FINAL, Run
from ddqcli.training.evaluate import OnProgress

RUNTIMES: dict[Int8Format, Int8Runtime] = {each.file_format: each for each in (LITERT, EXECUTORCH)}
_CALIBRATION = 128  # samples whose values the untrained grids cover
_COMPARED = 8  # samples on which runtime and graph are compared step by step
_MOST_STEPS = 1.5  # of a typical output: one, and float32's last digit
_MOST_SAMPLES = 10_000  # these runtimes take one sample at a time


@dataclass(frozen=True)
class Int8Row:
    """One weight of the file."""

    name: str
    values: int
    rounded: int  # of these values; the others are the trained integers


@dataclass(frozen=True)
class Int8Result(Exported):
    """A verified file of LiteRT or ExecuTorch."""

    runtime: str
    takes: str  # by a call
    file_format: Int8Format
    size: int  # bytes
    layers: tuple[Int8Row, ...]
    floats: tuple[str, ...]  # weights that stay float, 4 bytes a value
    metric: Metric  # of the accuracies in the comparison
    steps: float | None  # the most between the runtime's outputs and the graph's; None if float
    compared: Comparison  # with the trained model
    unchecked: tuple[str, ...]  # reasons why something was not compared

    @property
    def values(self) -> int:
        """Weights in int8: a byte each."""
        return sum(row.values for row in self.layers)

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            **self.first_data(self.file_format),
            "sizes": {"file": self.size, "weights": self.values},
            "layers": [asdict(row) for row in self.layers],
            "float_weights": list(self.floats),
            "verified": {"tensors": len(self.layers), "values": self.values},
            "steps": self.steps,
            "compared": asdict(self.compared),
            "unchecked": list(self.unchecked),
        }


def export_int8(
    file_format: Int8Format,
    run_dir: Path | None = None,
    out: Path | None = None,
    *,
    trust: bool = False,
    on_progress: OnProgress | None = None,
) -> Int8Result:
    """Write the run's model to `out` (default: model.tflite or .pte in the run folder) and run it.

    The network's code runs under the rule of `ddqcli.runs.trust`, which `trust` overrides. Raises
    UsageError for what the runtime cannot hold, and VerificationError if a weight in the file, or
    an answer of the runtime, differs. The file is then not written.
    """
    runtime = RUNTIMES[file_format]
    runtime.require()
    run = Run.open(run_dir, trust=trust)
    path = out or run.path / f"model.{file_format}"
    results: list[Int8Result] = []
    with run.held():
        expected = _expected(run, runtime)
        raw = runtime.convert(expected.model)

        def write(temporary: Path) -> None:
            temporary.write_bytes(raw)
            results.append(_verified(run, temporary, path, expected, runtime, on_progress))

        write_atomic(path, write, inputs=run.inputs())
    return results[0]


@dataclass(frozen=True)
class _Expected:
    """The graph of a run, and the torch model to compare it with."""

    model: Int8Model
    reference: Reference
    samples: list[tuple[Tensor, ...]]


def _expected(run: Run, runtime: Int8Runtime) -> _Expected:
    frozen = run.parsed(FINAL, FrozenModel.from_state)
    reference = reference_of(run, frozen, runtime.name)
    require_int8_inputs(reference.model, runtime.name)
    samples = list(islice(_held_out_samples(reference, runtime), _CALIBRATION))
    model = make_int8(reference.model, frozen.weights(), samples, runtime.name)
    return _Expected(model, reference, samples)


def _held_out_samples(reference: Reference, runtime: Int8Runtime) -> Iterator[tuple[Tensor, ...]]:
    """Yield held-out training samples, or those of the example where there are no data."""
    if reference.data is None:
        yield from one_by_one(reference.example, runtime.name)
        return
    for x, _ in reference.data.held_out.epoch(0):
        yield from one_by_one(x, runtime.name)


def _verified(
    run: Run,
    file: Path,
    name: Path,
    expected: _Expected,
    runtime: Int8Runtime,
    on_progress: OnProgress | None,
) -> Int8Result:
    """Read the weights back and run the file. Errors call it `name`."""
    raw, model, reference = file.read_bytes(), expected.model, expected.reference
    answer = runtime.open(file)
    if missing := runtime.missing(raw, model.weights):
        raise VerificationError(f"{name} lacks the trained integers of {missing[0]}.")
    steps = _steps(answer, expected, runtime.name, name)
    compared = compare_with(
        reference,
        sample_by_sample(answer),
        runtime.name,
        name=name,
        on_progress=on_progress,
        max_samples=_MOST_SAMPLES,
    )
    return Int8Result(
        run_dir=run.path,
        warnings=run.report().warnings,
        path=name,
        float_bytes=run.report().totals.float_bytes,
        runtime=runtime.name,
        takes=runtime.takes,
        file_format=runtime.file_format,
        size=len(raw),
        layers=tuple(_row(weight, value) for weight, value in model.weights.items()),
        floats=model.floats,
        metric=reference.metric,
        steps=steps,
        compared=compared,
        unchecked=reference.unchecked,
    )


def _row(name: str, value: Symmetric) -> Int8Row:
    channel = value.integers[0].size
    return Int8Row(name, value.integers.size, int((~value.exact).sum()) * channel)


@torch.no_grad()
def _steps(answer: OneAnswer, expected: _Expected, runtime: str, name: Path) -> float | None:
    """Return the largest difference between runtime and graph, in steps of the outputs' grids.

    Raises VerificationError if a typical output differs by more than 1.5 steps.
    """
    differences = []
    for sample in expected.samples[:_COMPARED]:
        found = answer([x.numpy() for x in sample])
        wanted = expected.model.module(*sample)
        for theirs, ours, step in zip(found, wanted, expected.model.steps, strict=True):
            if step is not None:
                differences.append(np.abs(theirs - ours.numpy()).ravel() / step)
    if not differences:
        return None
    together = np.concatenate(differences)
    if not np.median(together) <= _MOST_STEPS:
        raise VerificationError(
            f"{runtime} answers {np.median(together):.0f} steps beside the integers of {name}."
        )
    return float(together.max())
