"""Cross-entropy and top-1 accuracy for class scores [B, K] and labels [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ddqcli.errors import DataError

_IGNORED = -100  # a label that torch's cross-entropy leaves out
Score = Callable[[Any, Any], Tensor]  # (output, target) -> loss or metric


def classification(
    count: int | None, *, exact: bool, own_loss: bool = False
) -> tuple[Score, Score]:
    """Return the mean cross-entropy, and the top-1 hits [B] as 0 or 1.

    `count` is the number of classes, if known. The model may give more scores unless `exact`.
    Beside an `own_loss`, which may ignore labels, the metric counts a label without score as wrong.
    Both functions raise DataError if output [B, K] and target [B] do not fit together.
    """

    def loss(output: Any, target: Any) -> Tensor:
        scores = _check(output, target, count, exact)
        try:
            return F.cross_entropy(scores.float(), target.long())
        except IndexError:
            _check_labels(scores, target)
            raise

    def metric(output: Any, target: Any) -> Tensor:
        scores = _check(output, target, count, exact)
        if not own_loss:
            _check_labels(scores, target)
        hits: Tensor = scores.argmax(1) == target
        return hits.float()

    return loss, metric


def _check(output: Any, target: Any, count: int | None, exact: bool) -> Tensor:
    """Return the output if it is class scores [B, K] that fit the labels [B]."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        is_tensor = isinstance(output, Tensor)
        kind = f"of shape {list(output.shape)}" if is_tensor else f"a {type(output).__name__}"
        raise DataError(
            f"The model's output is {kind}, not scores [B,K]; give a data factory with its own "
            "loss and metric (with train.distill.weight=1, a metric is enough)."
        )
    if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
        is_tensor = isinstance(target, Tensor)
        kind = f"{target.dtype} {list(target.shape)}" if is_tensor else f"a {type(target).__name__}"
        raise DataError(
            f"Targets are {kind}, not whole numbers [B]; give a data factory with loss and metric."
        )
    scores = output.shape[1]
    if count is not None and (scores < count or (exact and scores != count)):
        raise DataError(
            f"The model gives {scores} scores but the data have {count} classes; they must agree."
        )
    return output


def _check_labels(scores: Tensor, target: Tensor) -> None:
    """Raise DataError for a label that is no index of the scores; cross-entropy ignores -100."""
    count = scores.shape[1]
    outside = target[((target < 0) & (target != _IGNORED)) | (target >= count)]
    if len(outside):
        raise DataError(
            f"A label lies beyond the model's {count} scores: {outside[0]}; give labels from 0 to "
            f"{count - 1}, or a network with more scores."
        )
