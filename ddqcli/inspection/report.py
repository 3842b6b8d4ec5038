"""Read the report of a run folder or an exported file, without torch."""

from __future__ import annotations

from pathlib import Path

from ddqcli.errors import VerificationError
from ddqcli.runs.report import Report
from ddqcli.runs.run import Run


def read_report(target: Path | None) -> tuple[Path, Report]:
    """Return the path and the report of a run folder or an exported file; None: the newest run.

    Raises UsageError, DDQError for a damaged run and VerificationError for a damaged file.
    """
    if target is not None and target.is_file():
        return target, _artifact_report(target)
    run = Run.open(target)
    return run.path, run.report()


def _artifact_report(path: Path) -> Report:
    from ddqcli.artifact.read import read_artifact

    artifact = read_artifact(path)
    try:
        return Report.from_artifact(artifact)
    except (LookupError, TypeError, ValueError) as error:
        raise VerificationError(
            f"{path} carries no report; it was not written by `ddq export`."
        ) from error
