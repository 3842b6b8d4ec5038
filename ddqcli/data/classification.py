"""Cross-entropy and top-1 accuracy for class scores [B, K] and labels [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ddqcli.errors import DataError

Score = Callable[[Any, Tensor], Tensor]


def classification(count: int | None, *, exact: bool) -> tuple[Score, Score]:
    """Cross entropy and top-1 hits for `count` classes, where known; a model may give more scores unless `exact`.

    Both raise DataError where output [B,K] and target [B] do not fit together.
    """

    def check(output: Any, target: Tensor) -> None:
        if not isinstance(output, Tensor) or output.dim() != 2:
            kind = (
                f"of shape {list(output.shape)}"
                if isinstance(output, Tensor)
                else f"a {type(output).__name__}"
            )
            raise DataError(
                f"The model's output is {kind}, not scores [B,K]; give a data factory with its own loss."
            )
        if target.dim() != 1 or target.is_floating_point():
            kind = f"{target.dtype} {list(target.shape)}"
            raise DataError(
                f"Targets are {kind}, not whole numbers [B]; give a data factory with loss and metric."
            )
        scores = output.shape[1]
        if count is not None and (scores < count or (exact and scores != count)):
            raise DataError(
                f"The model gives {scores} scores but the data have {count} classes; they must agree."
            )

    def loss(output: Any, target: Tensor) -> Tensor:
        check(output, target)
        try:
            return F.cross_entropy(output.float(), target.long())
        except IndexError as error:
            raise DataError(
                f"A label lies beyond the model's {output.shape[1]} scores: {error}"
            ) from error

    def metric(output: Any, target: Tensor) -> Tensor:
        check(output, target)
        return (output.argmax(1) == target).float()

    return loss, metric
