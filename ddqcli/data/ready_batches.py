"""Batches that a user's own iterable, such as a DataLoader, gives ready-made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


class ReadyBatches:
    """Batches of a re-iterable, made repeatable by seeding the fetch of each batch.

    Resuming within an epoch fetches the batches before `start` and drops them.
    """

    def __init__(
        self, batches: Any, device: torch.device, *, seed: int, shard: Shard = WHOLE
    ) -> None:
        self.batches, self.device, self.seed, self.shard = batches, device, seed, shard
        self._length, self.samples = self._count()

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... of an epoch, on the device."""
        for number, batch in enumerate(self._fetch(epoch)):
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
        for batch in self._fetch(_HELD_OUT_EPOCH):
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

    def _count(self) -> tuple[int, int]:
        """Return the numbers of batches and samples; unless a DataLoader knows, by a pass."""
        loader = self.batches
        if isinstance(loader, DataLoader) and loader.batch_size:
            sampler: Any = loader.sampler
            if hasattr(sampler, "__len__"):
                complete = len(loader) * loader.batch_size
                return len(loader), complete if loader.drop_last else len(sampler)
        sizes = [batch_size(batch) for batch in self._fetch(0)]
        return len(sizes), sum(sizes)

    def _fetch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch as they come. Raises DataError if one cannot be read."""
        iterator, number = None, 0
        while True:
            try:
                with seeded("batch", self.seed, epoch, number):
                    iterator = iter(self.batches) if iterator is None else iterator
                    batch = next(iterator, None)
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise DataError(f"Batch {number} of the data cannot be read: {reason}") from error
            if batch is None:
                return
            yield as_batch(batch)
            number += 1


@dataclass(frozen=True)
class _Stored:
    """Batches in memory, each given as a copy, as a network may change its input in place."""

    batches: list[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return (copied(batch) for batch in self.batches)
