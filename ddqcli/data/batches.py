"""The contract of batches, their order, and the operations on one batch.

A batch is the inputs of some samples and their targets, each a tree of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ddqcli.data.seeding import generator
from ddqcli.data.trees import Tree, map_tensors, shared_length, sliced, tensors
from ddqcli.errors import DataError

Batch = tuple[Tree, Tree]  # inputs and targets [B, ...]; targets are None in data without labels
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

    def of(self, batch: Tree) -> Tree:
        """Return samples `rank`, `rank` + `count`, ... of a tree of tensors [B, ...].

        Raises DataError if the tensors differ in B, so that no process can have a part of them.
        """
        if self.count == 1:
            return batch
        if shared_length(batch) is None:
            raise DataError(
                "The tensors of a batch differ in their first dimension, so several processes "
                "cannot share it; train with one."
            )
        return sliced(batch, slice(self.rank, None, self.count))


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
    """Return what a loader gave as a batch: a pair (inputs, targets), or inputs alone.

    Raises DataError if it is neither.
    """
    is_sequence = isinstance(value, (tuple, list))
    if is_sequence and len(value) in (1, 2):
        inputs, targets = (*value, None)[:2]
    else:
        inputs, targets = (None if is_sequence else value), None
    if not tensors(inputs):
        parts = value if is_sequence else value.values() if isinstance(value, Mapping) else ()
        names = ", ".join(type(part).__name__ for part in parts)
        raise DataError(
            f"A batch of the data is a {type(value).__name__} ({names}); give (inputs, targets), "
            "or inputs alone, which are tensors or tuples, lists or mappings of tensors."
        )
    return inputs, targets


def batch_size(batch: Batch) -> int:
    """Return the number of samples in a batch.

    A batch whose tensors differ in their first dimension cannot be divided: it counts as one.
    """
    length = shared_length(batch)
    return 1 if length is None else length


def take_samples(batch: Batch, indices: Tensor | slice) -> Batch:
    """Return the samples at `indices` as a batch; a batch that cannot be divided stays whole."""
    return batch if shared_length(batch) is None else sliced(batch, indices)


def prepare_batch(
    batch: Batch, prepare: Prepare | None, device: torch.device, epoch: int, number: int
) -> Batch:
    """Return a batch on the device, its input through `prepare` if given."""
    inputs, targets = batch
    inputs = prepare(inputs, epoch, number) if prepare else tree_to_device(inputs, device)
    return inputs, tree_to_device(targets, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; the copy to CUDA is asynchronous."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def tree_to_device(tree: Tree, device: torch.device) -> Tree:
    """Return a tree of tensors on `device`."""
    return map_tensors(lambda tensor: to_device(tensor, device), tree)
