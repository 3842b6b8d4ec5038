"""`ddq export --format coreml`: a finished run as a Core ML package of palettes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.commands.exported import Exported
from ddqcli.coreml.package import SUFFIX, Palette, make_package, require_coreml
from ddqcli.coreml.readback import require_same_palettes
from ddqcli.data.trees import Tree, sliced
from ddqcli.errors import UsageError
from ddqcli.qat.frozen import FrozenModel
from ddqcli.qat.load import to_torch
from ddqcli.runs.files import write_folder
from ddqcli.runs.run import FINAL, Run
from ddqcli.training.verify import attempt, load_held_out, rebuild_model

PACKAGE = f"model{SUFFIX}"
_UNCHECKED = "outputs: Core ML runs on Apple's systems only; compare some there"


@dataclass(frozen=True)
class PaletteRow:
    """One weight of the package."""

    name: str
    bits: int  # of the run; the most of its groups
    stored_bits: int  # of an index in Core ML
    bytes: int  # of tables and indices


@dataclass(frozen=True)
class CoreMLResult(Exported):
    """A package whose palettes were read back."""

    size: int  # bytes of all files of the package
    half: bool
    layers: tuple[PaletteRow, ...]
    values: int  # of these weights
    unchecked: tuple[str, ...]  # reasons why something was not compared

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            **self.first_data("coreml"),
            "half": self.half,
            "sizes": {"file": self.size},
            "layers": [asdict(row) for row in self.layers],
            "verified": {"tensors": len(self.layers), "values": self.values},
            "unchecked": list(self.unchecked),
        }


def export_coreml(
    run_dir: Path | None = None,
    out: Path | None = None,
    *,
    half: bool = False,
    trust: bool = False,
) -> CoreMLResult:
    """Write the run's model to `out` (default: model.mlpackage in the run folder).

    The package is read back from the disk. `half` computes in float16, as the Neural Engine does,
    with levels rounded to it. The network's code runs under the rule of `ddqcli.runs.trust`, which
    `trust` overrides.

    Raises UsageError for what Core ML cannot express, and VerificationError if a table or an index
    differs from what was trained. The package is then not written.
    """
    require_coreml()
    if out is not None and out.suffix != SUFFIX:
        raise UsageError(f"Core ML knows a package by its ending; name it {out.stem}{SUFFIX}.")
    run = Run.open(run_dir, trust=trust)
    with run.held():
        return _export(run, out or run.path / PACKAGE, half)


def _export(run: Run, path: Path, half: bool) -> CoreMLResult:
    frozen, report = run.parsed(FINAL, FrozenModel.from_state), run.report()
    expected = frozen.expected()
    tensors = {n: v for n, v in expected.items() if n not in {t.name for t in frozen.activations}}
    probe = run.probe()
    model = rebuild_model(run, to_torch(tensors), {}, str(run.path), probe)
    about = {"ddq": report.source.ddq, "source": report.source.sha256}
    weights = {tensor.name: tensor for tensor in frozen.quantized}
    example = probe["input"] if probe else _evaluation_sample(run)
    package, palettes = make_package(model, weights, example, about, half=half)
    results: list[list[str]] = []
    dtype = np.float16 if half else np.float32
    floats = {
        name: value.astype(dtype)
        for name, value in {**frozen.trained, **frozen.floats}.items()
        if value.dtype == np.float32 and name not in palettes
    }

    def write(temporary: Path) -> None:
        package.save(str(temporary))
        results.append(require_same_palettes(temporary, palettes, floats, path))

    write_folder(path, write, is_own=_is_own)
    return CoreMLResult(
        run_dir=run.path,
        warnings=report.warnings,
        path=path,
        size=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        float_bytes=report.totals.float_bytes,
        half=half,
        layers=tuple(_row(name, palette, weights[name]) for name, palette in palettes.items()),
        values=sum(palette.indices.size for palette in palettes.values()),
        unchecked=(_UNCHECKED, *_notes(frozen, palettes, results[0])),
    )


def _is_own(folder: Path) -> bool:
    """True for a package that ddq has written: it is named among the metadata."""
    model = folder / "Data" / "com.apple.CoreML" / "model.mlmodel"
    return model.is_file() and b"\n\x03ddq\x12" in model.read_bytes()  # a key of a protobuf map


def _evaluation_sample(run: Run) -> Tree:
    """Return the inputs of a sample of the evaluation data. Raises UsageError without any."""
    data, reason = attempt(lambda: load_held_out(run))
    if data is None:
        raise UsageError(f"Core ML export needs an example input, and the run holds none: {reason}")
    return sliced(next(iter(data.val.epoch(0)))[0], slice(1))


def _row(name: str, palette: Palette, weight: QuantizedTensor) -> PaletteRow:
    stored = palette.tables.shape[1].bit_length() - 1
    return PaletteRow(name, max(weight.bits), stored, palette.nbytes)


def _notes(frozen: FrozenModel, palettes: dict[str, Palette], missing: list[str]) -> list[str]:
    """Return what else a reader of the result must know."""
    notes = []
    if frozen.activations:
        notes.append("the quantizers of inputs: Core ML's activations are float")
    plain = [t.name for t in frozen.quantized if len(t.shape) > 1 and t.name not in palettes]
    if plain:
        notes.append(f"weights that Core ML stores in another form, in float: {', '.join(plain)}")
    if others := [name for name in missing if name not in plain]:
        notes.append(f"tensors that Core ML merged with others: {', '.join(others)}")
    return notes
