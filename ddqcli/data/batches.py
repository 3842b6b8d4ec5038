"""The contract of batches, their order, and the operations on one batch.

Batches are two tensors, an input and a target. Other files leave that to the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ddqcli.data.seeding import generator
from ddqcli.errors import DataError

Batch = tuple[Tensor, Tensor]  # input [B, ...] and target [B, ...]
Prepare = Callable[[Tensor, int, int], Tensor]  # (input, epoch, batch number) -> input on device


class Batches(Protocol):
    """Batches of a data set, the same for the same seed and epoch.

    They do not depend on the number of worker processes or on the state of global random number
    generators, and an epoch can be resumed at any batch.
    """

    samples: int  # in the data set

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... of epoch `epoch`, on the device."""

    def fingerprint(self) -> str:
        """Return a text that differs for other data.

        Covers all data in memory, and a few samples of data that are read while training; floats
        to about a percent. Samples that differ each time they are read have the fingerprint "".
        """


@dataclass(frozen=True)
class Shard:
    """The part of one process in a run of `count` processes."""

    rank: int = 0
    count: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """Return samples `rank`, `rank` + `count`, ... of a batch [B, ...]."""
        return batch[self.rank :: self.count] if self.count > 1 else batch


WHOLE = Shard()


@dataclass(frozen=True)
class BatchOrder:
    """The samples of each batch: shuffled with a seed, in order and complete without one.

    With a seed, the last incomplete batch is dropped unless it is the only one.
    """

    samples: int  # in all batches together, before any is dropped
    batch_size: int  # before sharding
    seed: int | None = None
    shard: Shard = WHOLE
    # [samples], if these are a part of a data set. Tensors cannot be compared by ==.
    indices: Tensor | None = field(default=None, compare=False)

    def __len__(self) -> int:
        if self.seed is None or self.samples < self.batch_size:
            return -(-self.samples // self.batch_size)
        return self.samples // self.batch_size

    def batches(self, epoch: int) -> list[Tensor]:
        """Return the sample indices [B] of each batch of the epoch, this process's shard of it."""
        if self.seed is None:
            indices = torch.arange(self.samples)
        else:
            indices = torch.randperm(self.samples, generator=generator("order", self.seed, epoch))
        if self.indices is not None:
            indices = self.indices[indices]
        batches = torch.split(indices, self.batch_size)
        return [self.shard.of(batch) for batch in batches[: len(self)]]


def as_batch(value: Any) -> Batch:
    """Return what a loader gave as a batch. Raises DataError if it is not two tensors."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        inputs, targets = value
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return inputs, targets
    parts = value if isinstance(value, (tuple, list)) else ()
    names = ", ".join(type(part).__name__ for part in parts)
    raise DataError(
        f"A batch of the data is a {type(value).__name__} ({names}); give two tensors, "
        "(input, target)."
    )


def batch_size(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return len(batch[1])


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to each tensor of a batch."""
    inputs, targets = batch
    return function(inputs), function(targets)


def take_samples(batch: Batch, indices: Tensor) -> Batch:
    """Return the samples at `indices` as a batch."""
    return map_batch(lambda tensor: tensor[indices], batch)


def prepare_batch(
    batch: Batch, prepare: Prepare | None, device: torch.device, epoch: int, number: int
) -> Batch:
    """Return a batch on the device, its input through `prepare` if given."""
    inputs, targets = batch
    inputs = prepare(inputs, epoch, number) if prepare else to_device(inputs, device)
    return inputs, to_device(targets, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; the copy to CUDA is asynchronous."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
