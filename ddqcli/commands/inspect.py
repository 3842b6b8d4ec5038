"""`ddq inspect`: the weights of a checkpoint, a run or an exported file, as rows and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddqcli.checkpoint.tensors import is_artifact, open_tensors
from ddqcli.inspection.checkpoint_rows import CheckpointResult, Progress, describe_checkpoint

if TYPE_CHECKING:
    from ddqcli.inspection.trained_rows import TrainedResult


def inspect(
    path: Path,
    *,
    out: Path | None = None,
    pickle: bool = False,
    on_progress: Progress | None = None,
) -> CheckpointResult | TrainedResult:
    """Describe every weight tensor in `path`: a checkpoint, a run folder or an exported file.

    Pictures and a page of them go into `out`. `pickle` allows a checkpoint that runs code.
    `on_progress(done, total, name)` is called before each tensor and once at the end. Raises
    DDQError and its children.
    """
    if path.is_dir() or is_artifact(path):
        return inspect_trained(path, out=out, on_progress=on_progress)
    return inspect_checkpoint(path, out=out, pickle=pickle, on_progress=on_progress)


def inspect_checkpoint(
    path: Path,
    *,
    out: Path | None = None,
    pickle: bool = False,
    on_progress: Progress | None = None,
) -> CheckpointResult:
    """`inspect` of a checkpoint. Raises CheckpointError."""
    tensors, note = open_tensors(path, pickle=pickle)
    result = describe_checkpoint(tensors, path, note, on_progress)
    if out is None:
        return result
    from ddqcli.inspection.checkpoint_page import write_checkpoint_page  # imports matplotlib

    return replace(result, pictures=write_checkpoint_page(result, out, on_progress))


def inspect_trained(
    path: Path, *, out: Path | None = None, on_progress: Progress | None = None
) -> TrainedResult:
    """`inspect` of a run folder or an exported file. Raises UsageError, VerificationError."""
    from ddqcli.inspection.trained_rows import describe_trained

    result = describe_trained(path, on_progress)
    if out is None:
        return result
    from ddqcli.inspection.trained_page import write_trained_page  # imports matplotlib

    return replace(result, pictures=write_trained_page(result, out, on_progress))
