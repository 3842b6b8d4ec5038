"""A line of metrics and a folder's content, for the tests of run folders."""

from __future__ import annotations

from dataclasses import dataclass

from ddqcli.runs.names import MARKER
from ddqcli.runs.run import Run


@dataclass(frozen=True)
class Metrics:
    step: int
    loss: float = 0.5


def names(run: Run) -> set[str]:
    """Return the names in a run folder, but for its marker."""
    return {path.name for path in run.path.iterdir()} - {MARKER}
