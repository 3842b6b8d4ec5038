"""The common part of all export formats: the first fields of a result, and the run of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli.errors import UsageError
from ddqcli.recipe.missing_file import missing_file
from ddqcli.runs.run import REPORT, Run


@dataclass(frozen=True)
class Exported:
    """A verified file of a run."""

    run_dir: Path
    warnings: tuple[str, ...]  # of the run
    path: Path
    float_bytes: int

    def first_data(self, file_format: str) -> dict[str, Any]:
        """Return the first keys of the JSON-able result, the same for every format."""
        return {
            "run_dir": str(self.run_dir),
            "warnings": list(self.warnings),
            "path": str(self.path),
            "format": file_format,
            "float_bytes": self.float_bytes,
        }


def require_file(file: Path) -> None:
    """Raise UsageError if there is no such file."""
    if not file.is_file():
        raise UsageError(missing_file(file))


def run_of(file: Path, run_dir: Path | None, *, trust: bool = False) -> Run:
    """Open the run of an exported file: `run_dir`, or else the file's folder, or the newest run."""
    beside = file.parent if (file.parent / REPORT).is_file() else None
    return Run.open(run_dir or beside, trust=trust)
