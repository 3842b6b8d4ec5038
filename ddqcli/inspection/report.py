"""Read the report of a run folder or an exported file, without torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ddqcli.errors import VerificationError
from ddqcli.recipe.faults import field_path, plain_message
from ddqcli.runs.report import Report
from ddqcli.runs.run import Run

_SHOWN = 3  # faults


def read_report(source: Path | None, target: str | None = None) -> tuple[Path, Report]:
    """Return the path and the report of a run folder or an exported file; None: the newest run.

    `target` picks one run of a sweep. Raises UsageError, DDQError for a damaged run and
    VerificationError for a damaged file.
    """
    if source is not None and source.is_file() and target is None:
        return source, _artifact_report(source)
    run = Run.open(source, target)
    return run.path, run.report()


def _artifact_report(path: Path) -> Report:
    from ddqcli.artifact.read import read_artifact

    artifact = read_artifact(path)
    try:
        return Report.from_artifact(artifact)
    except ValidationError as error:
        faults = [f"report.{field_path(e)}: {plain_message(e)}" for e in error.errors()]
        raise VerificationError(
            f"{path} contradicts itself: in its manifest, {'; '.join(faults[:_SHOWN])}."
        ) from error
    except LookupError as error:
        raise VerificationError(
            f"{path} carries no report; it was not written by `ddq export`."
        ) from error
    except ValueError as error:
        raise VerificationError(f"{path} carries the report of another file ({error}).") from error
