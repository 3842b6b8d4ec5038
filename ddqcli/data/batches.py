"""Batches of an epoch, from memory, from processes that read samples, or from an iterable that is already batched.

All kinds give the same batches for the same (seed, epoch), and from batch `start` on the same ones as an epoch run
from its beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ddqcli.data.augment import to_device
from ddqcli.data.seeding import generator, seeded
from ddqcli.errors import DataError


class Batches(Protocol):
    """What training and evaluation run through."""

    samples: int  # in the set

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of epoch `epoch` as (input, target) on the device."""

    def fingerprint(self) -> str:
        """Tells other data from these: of what lies in memory all, of what is read while training a few samples.

        Floats are compared by a few samples, and to a percent: what a factory computes differs in the last bits with the
        number of threads. Samples that are drawn anew at each reading tell nothing but their number.
        """


_FEW = 16  # samples that stand for all


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tuple(tensor.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _few(samples: int) -> list[int]:
    """The indices of a few samples, spread evenly from the first to the last."""
    return torch.linspace(0, samples - 1, min(_FEW, samples)).long().tolist()


def _coarse(values: Tensor) -> Tensor:
    """Whole numbers as they are; of floats, mean and deviation of a few samples to about a percent."""
    if not values.is_floating_point():
        return values
    flat = values[_few(len(values))].detach().double().flatten(1)
    mean, deviation = flat.mean(1), flat.std(1, correction=0)
    scale = torch.maximum(mean.abs(), deviation).clamp_min(1e-30)
    return (
        torch.stack([100 * mean / scale, 100 * deviation / scale, 100 * scale.log()]).round().long()
    )


def _repeatable(batches: Iterable[tuple[Tensor, Tensor]]) -> str:
    """The fingerprint of one batch, read twice; none if the two differ."""
    first, again = (digest(map(_coarse, batch)) for batch in batches)
    return first if first == again else ""


@dataclass(frozen=True)
class Shard:
    """The share of one process in a run of `count` processes: of every batch, each count-th sample from `rank` on."""

    rank: int = 0
    count: int = 1

    def of(self, batch: Tensor) -> Tensor:
        return batch[self.rank :: self.count] if self.count > 1 else batch


WHOLE = Shard()


@dataclass(frozen=True)
class BatchOrder:
    """Which samples make which batch; without a seed all of them, in order."""

    samples: int
    batch_size: int
    seed: int | None = None
    shard: Shard = WHOLE

    def __len__(self) -> int:
        if self.seed is None or self.samples < self.batch_size:
            return -(-self.samples // self.batch_size)
        return (
            self.samples // self.batch_size
        )  # training drops the last incomplete batch, unless it is the only one

    def batches(self, epoch: int) -> list[Tensor]:
        """The sample indices of each batch of the epoch."""
        if self.seed is None:
            indices = torch.arange(self.samples)
        else:
            indices = torch.randperm(self.samples, generator=generator("order", self.seed, epoch))
        return [self.shard.of(batch) for batch in indices.split(self.batch_size)[: len(self)]]


class MemoryBatches:
    """Batches of tensors that lie in memory: inputs [N,...] and targets [N,...]."""

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        order: BatchOrder,
        device: torch.device,
        prepare: Callable[[Tensor, int, int], Tensor] | None = None,
    ) -> None:
        self.inputs, self.targets, self.order, self.device, self.prepare = (
            inputs,
            targets,
            order,
            device,
            prepare,
        )
        self.samples = order.samples

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number, indices in enumerate(self.order.batches(epoch)[start:], start):
            inputs = self.inputs[indices]
            inputs = (
                self.prepare(inputs, epoch, number)
                if self.prepare
                else to_device(inputs, self.device)
            )
            yield inputs, to_device(self.targets[indices], self.device)

    def fingerprint(self) -> str:
        return digest(map(_coarse, (self.inputs, self.targets)))


class _Keyed:
    """Samples by (epoch, index), each read under its own seed; one that cannot be read becomes its message.

    A message, because an error raised in a DataLoader's process reaches the user as a page of traceback.
    """

    def __init__(self, samples: Any, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        try:
            with seeded("sample", self.seed, epoch, index):
                return self.samples[index]
        except DataError as error:
            return str(error)
        except Exception as error:
            return f"Sample {index} of the data cannot be read: {type(error).__name__}: {error}"


def _collated(samples: list[Any]) -> Any:
    """A batch of samples, or the message of what is wrong with it."""
    message = next((sample for sample in samples if isinstance(sample, str)), None)
    if message is not None:
        return message
    try:
        return default_collate(samples)
    except Exception as error:
        return f"The samples of a batch do not fit together: {' '.join(str(error).split())[:200]}"


class LoadedBatches:
    """Batches of a map-style set of (input, target) that is read while training, by `workers` processes."""

    def __init__(
        self,
        dataset: Any,
        order: BatchOrder,
        device: torch.device,
        *,
        seed: int,
        workers: int,
        prepare: Callable[[Tensor, int, int], Tensor] | None = None,
    ) -> None:
        self.dataset, self.order, self.device, self.prepare = (
            _Keyed(dataset, seed),
            order,
            device,
            prepare,
        )
        self.samples, self.workers = order.samples, workers

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        keys = (
            [(epoch, index) for index in indices.tolist()]
            for indices in self.order.batches(epoch)[start:]
        )
        for number, (inputs, targets) in enumerate(
            map(_pair, self._read(keys, self.workers)), start
        ):
            inputs = (
                self.prepare(inputs, epoch, number)
                if self.prepare
                else to_device(inputs, self.device)
            )
            yield inputs, to_device(targets, self.device)

    def fingerprint(self) -> str:
        few = [(0, index) for index in _few(self.samples)]
        workers = min(
            self.workers, 1
        )  # one if any: a file that the set opens here would not survive their fork
        return _repeatable(map(_pair, self._read([few, few], workers)))

    def _read(self, keys: Iterable[list[tuple[int, int]]], workers: int) -> Iterator[Any]:
        """The batches of the samples with these keys."""
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collated,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        try:
            yield from loader
        except (
            Exception
        ) as error:  # samples report their own faults, so this is one of the processes
            detail = f"data.workers={self.workers} failed: {' '.join(str(error).split())[:200]}"
            raise DataError(f"Reading with {detail}; try data.workers=0.") from error


class ReadyBatches:
    """A re-iterable of ready batches, such as a DataLoader; made repeatable by seeding the fetch of each batch.

    Starting in the midst of an epoch fetches the batches before `start` and drops them.
    """

    def __init__(
        self, batches: Any, device: torch.device, *, seed: int, shard: Shard = WHOLE
    ) -> None:
        self.batches, self.device, self.seed, self.shard = batches, device, seed, shard
        if (
            isinstance(batches, DataLoader)
            and batches.batch_size
            and hasattr(batches.sampler, "__len__")
        ):
            self._length = len(batches)
            self.samples = len(batches.sampler)
            if batches.drop_last:
                self.samples = self._length * batches.batch_size
        else:  # nothing but a pass over them tells
            sizes = [len(target) for _, target in self._fetched(0)]
            self._length, self.samples = len(sizes), sum(sizes)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (inputs, targets) in enumerate(self._fetched(epoch)):
            if number >= start:
                yield (
                    to_device(self.shard.of(inputs), self.device),
                    to_device(self.shard.of(targets), self.device),
                )

    def fingerprint(self) -> str:
        return _repeatable(next(self._fetched(0)) for _ in range(2))

    def _fetched(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        iterator, number = None, 0
        while True:
            try:
                with seeded("batch", self.seed, epoch, number):
                    iterator = iter(self.batches) if iterator is None else iterator
                    batch = next(iterator, None)
            except Exception as error:
                detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise DataError(f"Batch {number} of the data cannot be read: {detail}") from error
            if batch is None:
                return
            yield _pair(batch)
            number += 1


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch as (input, target). Raises DataError where it is not two tensors."""
    if isinstance(batch, str):
        raise DataError(batch)
    if (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
    ):
        return batch[0], batch[1]
    parts = (
        ", ".join(type(part).__name__ for part in batch) if isinstance(batch, (tuple, list)) else ""
    )
    raise DataError(
        f"A batch of the data is a {type(batch).__name__} ({parts}); give two tensors, (input, target)."
    )
