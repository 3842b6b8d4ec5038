"""The common result of opening a folder, a .npz file or a data set: two splits of images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """Training and evaluation images.

    Each split is a map-style data set of (PIL image, label), or a TensorDataset of inputs that are
    ready for the model.
    """

    train: Any
    val: Any
    location: str  # for messages: "digits.npz (x_test for evaluation)"
    classes: tuple[str, ...] | None = None  # names, if known
    count: int | None = None  # number of classes, if known
    keep_size: bool = False  # do not resize large images by default: they already have their size


def list_names(names: Iterable[object]) -> str:
    """Return the names as text: all of few, the first of many."""
    texts = [str(name) for name in names]
    shown = ", ".join(texts[:8]) or "nothing"
    return shown if len(texts) <= 8 else f"{shown} and {len(texts) - 8} more"
