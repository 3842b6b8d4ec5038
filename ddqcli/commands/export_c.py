"""`ddq export --format c`: a finished run as one C99 header, read back and compiled."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddqcli.c_header.header import FlashRow, header_text
from ddqcli.c_header.verify import require_same_header, require_same_integers
from ddqcli.commands.exported import Exported, require_file, run_of
from ddqcli.errors import VerificationError
from ddqcli.qat.frozen import FrozenModel
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import FINAL, Run

HEADER = "model.h"


@dataclass(frozen=True)
class CResult(Exported):
    """A verified header."""

    size: int  # bytes of text
    layers: tuple[FlashRow, ...]
    tensors: int  # compared bit for bit
    values: int  # of these tensors
    compiler: str | None  # that compiled it; None if it was not compiled
    unchecked: tuple[str, ...]  # reasons why something was not compared

    @property
    def flash(self) -> int:
        """Bytes of constants in the program."""
        return sum(row.bytes for row in self.layers)

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            **self.first_data("c"),
            "sizes": {"file": self.size, "flash": self.flash},
            "layers": [asdict(row) for row in self.layers],
            "verified": {"tensors": self.tensors, "values": self.values},
            "compiler": self.compiler,
            "unchecked": list(self.unchecked),
        }


def export_c(run_dir: Path | None = None, out: Path | None = None) -> CResult:
    """Write the run's model to `out` (default: model.h in the run folder) and read it back.

    Raises UsageError for what a header cannot hold, and VerificationError if a bit differs from
    what was trained, or the compiled kernels unpack other integers. The file is then not written.
    """
    run = Run.open(run_dir)
    path = out or run.path / HEADER
    with run.held():
        frozen, text, rows = _expected(run)
        results: list[CResult] = []

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            results.append(_verified(run, temporary, path, frozen, text, rows))

        write_atomic(path, write, inputs=run.inputs())
    return results[0]


def check_c(file: Path, run_dir: Path | None = None) -> CResult:
    """Verify an existing header against its run: `run_dir`, or its own folder, or the newest.

    Raises as `export_c`.
    """
    require_file(file)
    run = run_of(file, run_dir)
    with run.held():
        return _verified(run, file, file, *_expected(run))


def _expected(run: Run) -> tuple[FrozenModel, str, tuple[FlashRow, ...]]:
    frozen, source = run.parsed(FINAL, FrozenModel.from_state), run.report().source
    title = f"{Path(source.path).name} ({source.arch}), quantized by ddq {source.ddq}"
    text, rows = header_text(frozen, title)
    return frozen, text, tuple(rows)


def _verified(
    run: Run, file: Path, name: Path, frozen: FrozenModel, text: str, rows: tuple[FlashRow, ...]
) -> CResult:
    """Read the header back, which should hold `text`; errors call it `name`."""
    raw = file.read_bytes()
    require_same_header(raw.decode("utf-8", errors="replace"), frozen, name)  # names the tensor
    if raw != text.encode():
        raise VerificationError(
            f"{name} differs from what this version of ddq exports of {run.path}."
        )
    # From here on it is our own text: what a stranger wrote is neither compiled nor run.
    compiler, unchecked = require_same_integers(text, frozen, name)
    report = run.report()
    stored = [*frozen.trained.values(), *frozen.floats.values()]
    return CResult(
        run_dir=run.path,
        warnings=report.warnings,
        path=name,
        size=len(raw),
        float_bytes=report.totals.float_bytes,
        layers=rows,
        tensors=len(stored),
        values=sum(array.size for array in stored),
        compiler=compiler,
        unchecked=(unchecked,) if unchecked else (),
    )
