"""Batches of tensors that are kept in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddqcli.data.batches import Batch, BatchOrder, Prepare, prepare_batch, take_samples
from ddqcli.data.fingerprint import fingerprint


class MemoryBatches:
    """Batches of `data`: all inputs [N, ...] and targets [N, ...] in memory.

    `data` may be shared: batches are copies.
    """

    def __init__(
        self,
        data: Batch,
        order: BatchOrder,
        device: torch.device,
        prepare: Prepare | None = None,
    ) -> None:
        self.data, self.order, self.device, self.prepare = data, order, device, prepare
        self.samples = order.samples

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... of an epoch, on the device."""
        for number, indices in enumerate(self.order.batches(epoch)[start:], start):
            batch = take_samples(self.data, indices)
            yield prepare_batch(batch, self.prepare, self.device, epoch, number)

    def fingerprint(self) -> str:
        """Return a hash of all of the data, also of samples that `order` leaves out."""
        return fingerprint(self.data)
