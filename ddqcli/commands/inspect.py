"""`ddq inspect`: what each layer's weights look like, and what quantizing them would cost, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ddqcli.artifact.tensors import tensor_bytes
from ddqcli.checkpoint.tensors import is_artifact, open_tensors
from ddqcli.errors import CheckpointError
from ddqcli.inspection.weights import (
    TOTAL_BITS,
    InspectResult,
    Progress,
    is_weight,
    layer_rows,
    value_range,
)

if TYPE_CHECKING:
    from ddqcli.inspection.trained import TrainedResult


def inspect(
    path: Path,
    *,
    out: Path | None = None,
    pickle: bool = False,
    on_progress: Progress | None = None,
) -> InspectResult | TrainedResult:
    """Look at every weight tensor in the checkpoint, run folder or exported file `path`; write pictures and a page into `out`.

    `on_progress(done, total, name)` is called before each tensor and once at the end. Raises DDQError and its children.
    """
    if path.is_dir() or is_artifact(path):
        from ddqcli.inspection.trained import inspect_trained

        return inspect_trained(path, out=out, on_progress=on_progress)
    return inspect_checkpoint(path, out=out, pickle=pickle, on_progress=on_progress)


def inspect_checkpoint(
    path: Path, *, out: Path | None, pickle: bool, on_progress: Progress | None
) -> InspectResult:
    """`inspect` of a checkpoint. Raises CheckpointError."""
    tensors, note = open_tensors(path, pickle=pickle)
    if not any(tensor.parameters for tensor in tensors):
        raise CheckpointError(f"{path} holds no tensors; save the model's state_dict() in it.")
    weights = [tensor for tensor in tensors if is_weight(tensor)]
    others = [tensor for tensor in tensors if not is_weight(tensor) and not tensor.same_as]
    for tensor in others:
        if tensor.floating:
            value_range(tensor, path)
    rest = {
        "tensors": len(others),
        "parameters": sum(tensor.parameters for tensor in others),
        "bytes": sum(tensor.bytes for tensor in others),
    }
    layers = tuple(layer_rows(weights, path, on_progress))
    result = InspectResult(
        path,
        note,
        layers,
        rest,
        {tensor.name: tensor.same_as for tensor in tensors if tensor.same_as},
        {
            bits: sum(tensor_bytes([row.parameters], [bits]) for row in layers) + rest["bytes"]
            for bits in TOTAL_BITS
        },
    )
    if out is None:
        return result
    from ddqcli.inspection.checkpoint_page import write_pictures

    return write_pictures(result, out, on_progress)
