"""Batches of a data set that is read while training, by worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddqcli.data.batches import Batch, BatchOrder, Prepare, as_batch, prepare_batch
from ddqcli.data.fingerprint import repeatable_fingerprint, spread_indices
from ddqcli.data.seeding import seeded
from ddqcli.data.trees import stacked
from ddqcli.errors import DataError

Key = tuple[int, int]  # epoch, sample index


class LoadedBatches:
    """Batches of a map-style data set of (input, target), read by `workers` processes."""

    def __init__(
        self,
        dataset: Any,
        order: BatchOrder,
        device: torch.device,
        *,
        seed: int,
        workers: int,
        prepare: Prepare | None = None,
    ) -> None:
        self.dataset = _SeededSamples(dataset, seed)
        self.order, self.device, self.prepare = order, device, prepare
        self.samples, self.workers = order.samples, workers

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... of an epoch; reads no sample before `start`.

        Raises DataError if a sample cannot be read or the samples of a batch cannot be stacked.
        """
        batches = self.order.batches(epoch)[start:]
        keys = ([(epoch, index) for index in indices.tolist()] for indices in batches)
        for number, batch in enumerate(self._read(keys, self.workers), start):
            yield prepare_batch(batch, self.prepare, self.device, epoch, number)

    def fingerprint(self) -> str:
        """Return a hash of a few samples, or "" if they differ each time they are read."""
        # Of all samples of the data set, also those that `order` leaves out.
        keys = [(0, index) for index in spread_indices(len(self.dataset.samples))]
        # In a worker process if there are any: a file that the data set opens in this one would
        # not survive their fork.
        return repeatable_fingerprint(self._read([keys, keys], min(self.workers, 1)))

    def _read(self, keys: Iterable[list[Key]], workers: int) -> Iterator[Batch]:
        """Yield one batch on the CPU for each list of keys."""
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]  # any object with __getitem__ will do
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # DataLoader would draw from the global one
        )
        try:
            for batch in loader:
                if isinstance(batch, str):
                    raise DataError(batch)
                yield as_batch(batch)
        except DataError:
            raise
        except Exception as error:  # samples report their own errors, so a process failed
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"Reading with data.workers={self.workers} failed: {reason}; try data.workers=0."
            ) from error


class _SeededSamples:
    """Samples by (epoch, index), each read under its own seed.

    An error is returned as a message: raised in a worker process, it would reach the user as a
    page of traceback.
    """

    def __init__(self, samples: Any, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        try:
            with seeded("sample", self.seed, epoch, index):
                return self.samples[index]
        except DataError as error:
            return str(error)
        except (Exception, SystemExit) as error:
            return f"Sample {index} of the data cannot be read: {type(error).__name__}: {error}"


def _collate(samples: list[Any]) -> Any:
    """Return the stacked samples, or the message of what is wrong with them."""
    message = next((sample for sample in samples if isinstance(sample, str)), None)
    if message is not None:
        return message
    try:
        return stacked(samples)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return (
            f"The samples of a batch do not fit together: {reason}; give all the same parts and "
            "shapes, or return a DataLoader with your own collate_fn from the data factory."
        )
