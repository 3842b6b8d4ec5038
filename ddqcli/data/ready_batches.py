"""Batches that a user's own iterable, such as a DataLoader, gives ready-made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddqcli.data.batches import (
    WHOLE,
    Batch,
    Shard,
    as_batch,
    batch_size,
    take_samples,
    tree_to_device,
)
from ddqcli.data.fingerprint import repeatable_fingerprint
from ddqcli.data.held_out import held_out_size
from ddqcli.data.seeding import seeded
from ddqcli.data.trees import copied, shared_length
from ddqcli.errors import DataError

_HELD_OUT_EPOCH = 2**31 - 1  # that no training reaches

_MOST_COUNTED = 10_000  # batches


class ReadyBatches:
    """Batches of a re-iterable, made repeatable by seeding the fetch of each batch.

    Resuming within an epoch fetches the batches before `start` and drops them.

    Args:
        batches: gives batches each time it is iterated over.
        steps: batches that a run takes at most. If `batches` has no length, this is the length of
            an epoch, in which a pass that ends is followed by another. Without it, a pass counts.
        name, remedy: for the message if that pass does not end.

    Attributes:
        samples: in an epoch; an estimate for batches without length.
        last_batch: number of samples in the last batch of an epoch.
    """

    def __init__(
        self,
        batches: Any,
        device: torch.device,
        *,
        seed: int,
        shard: Shard = WHOLE,
        steps: int | None = None,
        name: str = "The data",
        remedy: str = "give them an end",
    ) -> None:
        self.name, self.remedy = name, remedy
        self.batches, self.device, self.seed, self.shard = batches, device, seed, shard
        self.repeats = steps is not None and not _has_length(batches)
        if self.repeats and steps is not None:
            first = next(self._fetch(0), None)
            self.last_batch = 0 if first is None else batch_size(first)
            self._length, self.samples = steps, steps * self.last_batch
        else:
            self._length, self.samples, self.last_batch = self._count()

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... of an epoch, on the device."""
        for number, batch in enumerate(islice(self._passes(epoch), self._length)):
            if number >= start:
                yield tree_to_device(self.shard.of(batch), self.device)

    def held_out(self) -> ReadyBatches:
        """Return the first min(512, n / 8) of n samples of a pass of its own, kept in memory.

        All samples if there are fewer than 8. Training sees them too: no sample can be left out of
        batches that come ready-made.
        """
        missing = held_out_size(self.samples) or self.samples
        usual_size = round(self.samples / len(self))
        batches: list[Batch] = []
        for batch in self._passes(_HELD_OUT_EPOCH):
            size = usual_size if shared_length(batch) is None else batch_size(batch)
            count = min(missing, size)
            # A copy: a loader may fill the same memory again.
            batches.append(copied(take_samples(batch, slice(count))))
            missing -= count
            if missing == 0:
                break
        return ReadyBatches(_Stored(batches), self.device, seed=self.seed, shard=self.shard)

    def fingerprint(self) -> str:
        """Return a hash of the first batch, or "" if it differs each time it is read."""
        return repeatable_fingerprint(next(self._fetch(0)) for _ in range(2))

    def _count(self) -> tuple[int, int, int]:
        """Return the numbers of batches, samples, and samples in the last batch.

        Unless a DataLoader knows them, a pass counts. Raises DataError for one that does not end.
        """
        loader = self.batches
        if isinstance(loader, DataLoader) and loader.batch_size:
            sampler: Any = loader.sampler
            if hasattr(sampler, "__len__"):
                complete = len(loader) * loader.batch_size
                samples = complete if loader.drop_last else len(sampler)
                return len(loader), samples, samples - complete + loader.batch_size
        sizes = []
        for batch in self._fetch(0):
            sizes.append(batch_size(batch))
            if len(sizes) > _MOST_COUNTED and not _has_length(loader):
                raise DataError(
                    f"{self.name}, a {type(loader).__name__}, has no length, and "
                    f"{_MOST_COUNTED:,} batches of it are not all; {self.remedy}, or its class a "
                    "__len__."
                )
        return len(sizes), sum(sizes), sizes[-1] if sizes else 0

    def _passes(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; of batches without length, pass after pass."""
        number = 0
        while True:
            first = number
            for batch in self._fetch(epoch, number):
                number += 1
                yield batch
            if number == first or not self.repeats:
                return

    def _fetch(self, epoch: int, number: int = 0) -> Iterator[Batch]:
        """Yield the batches of a pass as they come, the first of them seeded as batch `number`.

        Raises DataError if one cannot be read.
        """
        iterator = None
        while True:
            try:
                with seeded("batch", self.seed, epoch, number):
                    iterator = iter(self.batches) if iterator is None else iterator
                    batch = next(iterator, None)
            except (Exception, SystemExit) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise DataError(f"Batch {number} of the data cannot be read: {reason}") from error
            if batch is None:
                return
            yield as_batch(batch)
            number += 1


def _has_length(batches: Any) -> bool:
    """True if the number of batches is known; a DataLoader asks its data set."""
    try:
        len(batches)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class _Stored:
    """Batches in memory, each given as a copy, as a network may change its input in place."""

    batches: list[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (copied(batch) for batch in self.batches)
