"""`ddq export`: a finished run as one verified safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddqcli import __version__
from ddqcli.artifact.read import Artifact, read_artifact
from ddqcli.artifact.sizes import Sizes
from ddqcli.artifact.tensors import INPUT_SUFFIX
from ddqcli.artifact.verify import require_same_tensors
from ddqcli.commands.exported import Exported, run_of
from ddqcli.errors import DDQError, UsageError, VerificationError
from ddqcli.qat.frozen import Array, FrozenModel
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.encode_run import encode_run, portable_recipe
from ddqcli.runs.evaluation import Accuracy, Metric
from ddqcli.runs.files import write_atomic
from ddqcli.runs.report import Report
from ddqcli.runs.run import FINAL, Run
from ddqcli.training.evaluate import OnProgress
from ddqcli.training.verify import BehaviorCheck, check_behavior, require_same_behavior

ARTIFACT = "model.safetensors"
_HALF = "float16"  # key in the file's meta: unquantized tensors were rounded to float16


@dataclass(frozen=True)
class ExportResult(Exported):
    """A verified file."""

    sizes: Sizes
    tensors: int  # compared bit for bit
    values: int  # of these tensors
    behavior: BehaviorCheck
    metric: Metric  # of the accuracies in `behavior`
    half: bool

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            **self.first_data("safetensors"),
            "half": self.half,
            "sizes": {
                **asdict(self.sizes),
                "payload": self.sizes.payload,
                "file": self.sizes.file,
            },
            "verified": {"tensors": self.tensors, "values": self.values},
            # Scripts read this key: its British spelling is frozen.
            "behaviour": asdict(self.behavior),
        }


def export(
    run_dir: Path | None = None,
    out: Path | None = None,
    *,
    half: bool = False,
    trust: bool = False,
    on_progress: OnProgress | None = None,
) -> ExportResult:
    """Write the run's model to `out` (default: model.safetensors in the run folder) and verify it.

    `half` stores unquantized tensors as float16, and the accuracy that the file then has. The file
    is written and read back without the network's code. Outputs need it: see
    `ddqcli.runs.trust`, which `trust` overrides.

    Raises UsageError, and VerificationError if the file, read by the numpy-only decoder in another
    process, differs in any bit from what was trained, or the network rebuilt from it computes
    something else. The file is then not written.
    """
    run = Run.open(run_dir, trust=trust)
    with run.held():
        return _export(run, out, half, on_progress)


def _export(run: Run, out: Path | None, half: bool, on_progress: OnProgress | None) -> ExportResult:
    frozen, report = _frozen_model(run, half=half), run.report()
    path = out or run.path / ARTIFACT
    results = []

    def write(temporary: Path) -> None:
        sizes = _write_verified(temporary, frozen, report, run.recipe(), path, half)
        check = check_behavior(temporary, run, on_progress)
        if half:
            measured = report.model_copy(
                update={"accuracy": _accuracy_of(check, report), "other_metrics": ()}
            )
            sizes = _write_verified(temporary, frozen, measured, run.recipe(), path, half)
        else:
            require_same_behavior(
                check, path, report.metric, quantized_inputs=bool(frozen.activations)
            )
        results.append((sizes, check))

    write_atomic(
        path, write, inputs=run.inputs()
    )  # a file that is not as trained never gets its name
    return _result(run, path, *results[0], frozen, half)


def check(
    file: Path,
    run_dir: Path | None = None,
    *,
    trust: bool = False,
    on_progress: OnProgress | None = None,
) -> ExportResult:
    """Verify an existing file against its run.

    The run is `run_dir`, or else the folder of the file, or else the newest run. `trust` is as in
    `export`. Raises UsageError,
    and VerificationError if the file is damaged or not what was trained.
    """
    artifact = read_artifact(file)
    try:
        run = run_of(file, run_dir, trust=trust)
    except UsageError as error:
        raise UsageError(
            f"{file} is undamaged, but there is nothing to compare it with: {error}"
        ) from error
    with run.held():
        return _check(file, artifact, run, on_progress)


def _check(
    file: Path, artifact: Artifact, run: Run, on_progress: OnProgress | None
) -> ExportResult:
    half = bool(artifact.meta.get(_HALF))
    _require_same_origin(file, artifact.meta, run, half)
    frozen = _frozen_model(run, half=half)
    require_same_tensors(file, frozen.expected(), name=file)
    _require_same_bytes(file, artifact, frozen, run, half)
    behavior = check_behavior(file, run, on_progress)
    if not half:
        require_same_behavior(
            behavior, file, run.report().metric, quantized_inputs=bool(frozen.activations)
        )
    return _result(run, file, artifact.sizes, behavior, frozen, half)


def _write_verified(
    temporary: Path, frozen: FrozenModel, report: Report, recipe: Recipe, path: Path, half: bool
) -> Sizes:
    """Write `temporary`, which becomes `path`. Raises VerificationError if it is not as trained."""
    try:
        raw, sizes = encode_run(frozen, report, recipe, {_HALF: True} if half else {})
    except ValueError as error:  # such as an accuracy that is NaN
        raise DDQError(
            f"{path} cannot be written: {error}, in the run's report or model."
        ) from error
    temporary.write_bytes(raw)
    require_same_tensors(
        temporary, frozen.expected(), name=path, consequence="; it was not written"
    )
    return sizes


def _require_same_origin(file: Path, meta: Mapping[str, Any], run: Run, half: bool) -> None:
    """Raise VerificationError if the report or the recipe embedded in the file is another run's."""
    embedded = meta.get("report")
    embedded = embedded if isinstance(embedded, dict) else {}
    report = run.report().embedded()
    unknown = embedded.keys() - report.keys()
    if half:
        del report["accuracy"]  # it was measured anew
    for key in ("warnings", "course"):  # a file too close to its budget leaves them out
        if not embedded.get(key):
            del report[key]
    different = [key for key in sorted(report) if embedded.get(key) != report[key]]
    recipe = meta.get("recipe")
    # Another version of ddq has other defaults, so its recipes leave out other fields.
    if recipe and report["source"]["ddq"] == __version__:
        own = json.loads(json.dumps(portable_recipe(run.recipe())))
        different += ["recipe"] if recipe != own else []
    if different := [*different, *sorted(unknown)]:
        raise VerificationError(
            f"{file} does not come from {run.path}: its {', '.join(different)} differ; "
            f"name its own run, `ddq export RUN --check {file}`."
        )


def _require_same_bytes(
    file: Path, artifact: Artifact, frozen: FrozenModel, run: Run, half: bool
) -> None:
    """Raise VerificationError for a file that holds more, or other, than its reader uses.

    Equal content gives equal bytes. Only for the version of ddq that made the run: others may say
    more or less about it.
    """
    report = run.report()
    if report.source.ddq != __version__:
        return
    if half:
        report = report.model_copy(update={"accuracy": Report.from_artifact(artifact).accuracy})
    raw, _ = encode_run(frozen, report, run.recipe(), {_HALF: True} if half else {})
    if raw != file.read_bytes():
        raise VerificationError(
            f"{file} differs from what this version of ddq exports of {run.path}, though its "
            "tensors are the same; export it again."
        )


def _accuracy_of(check: BehaviorCheck, report: Report) -> Accuracy | None:
    """Return the report's accuracy with the measured one in place of the run's.

    Raises UsageError if it was not measured.
    """
    if report.accuracy is None:
        return None
    if check.accuracy is None:
        raise UsageError(f"--half must measure its accuracy: {'; '.join(check.unchecked)}")
    return Accuracy.of(report.accuracy.float, check.accuracy, report.metric)


def _result(
    run: Run, path: Path, sizes: Sizes, behavior: BehaviorCheck, frozen: FrozenModel, half: bool
) -> ExportResult:
    tensors = [
        value for name, value in frozen.expected().items() if not name.endswith(INPUT_SUFFIX)
    ]
    return ExportResult(
        run_dir=run.path,
        warnings=run.report().warnings,
        path=path,
        sizes=sizes,
        float_bytes=run.report().totals.float_bytes,
        tensors=len(tensors),
        values=sum(array.size for array in tensors),
        behavior=behavior,
        metric=run.report().metric,
        half=half,
    )


def _frozen_model(run: Run, *, half: bool) -> FrozenModel:
    """Load the finished model; with `half`, round unquantized tensors to float16."""
    frozen = run.parsed(FINAL, FrozenModel.from_state)
    if half:
        floats = {name: _to_float16(name, value) for name, value in frozen.floats.items()}
        return replace(frozen, floats=floats)
    return frozen


def _to_float16(name: str, array: Array) -> Array:
    """Round a float32 or float64 array, and no other. Raises UsageError for values too large."""
    if array.dtype not in (np.float32, np.float64):
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.any(np.isinf(half) & np.isfinite(array)):
        largest = np.abs(array).max()
        raise UsageError(
            f"{name} holds values up to {largest:.3g}, beyond float16; export without --half."
        )
    return half
