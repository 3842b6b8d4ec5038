"""A user's own data: the function that a recipe names, and the batches of what it returns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ddqcli.data.batches import Batches, BatchOrder, Shard, as_batch
from ddqcli.data.classification import Score
from ddqcli.data.held_out import split_held_out
from ddqcli.data.loaded_batches import LoadedBatches
from ddqcli.data.memory_batches import MemoryBatches
from ddqcli.data.own_loss import ARGUMENTS
from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.data.source import list_names
from ddqcli.data.trees import has_numbers, shared_length
from ddqcli.errors import DataError, DDQError
from ddqcli.recipe.factory import import_factory
from ddqcli.recipe.schema import DataSection


@dataclass(frozen=True)
class FactoryData:
    """The result of a data factory: a mapping or an object with these names."""

    train: Any  # a data set, or re-iterable batches
    val: Any
    loss: Score | None  # (output, target) -> mean loss
    distill: Score | None  # (output, teacher's output) -> mean loss
    metric: Any  # (output, target) -> scores [B]; or a mapping with its name; or a list of these


def call_factory(spec: str, kwargs: dict[str, Any]) -> FactoryData:
    """Call the function `spec`. Raises DataError if it fails, or returns something else."""
    factory = import_factory(spec)
    try:
        data = factory(**kwargs)
    except DDQError:
        raise
    except (Exception, SystemExit) as error:
        arguments = f" with {kwargs}" if kwargs else ""
        raise DataError(
            f"The data factory {spec}{arguments} failed: {type(error).__name__}: {error}"
        ) from error
    keys = ("train", "val", "loss", "metric", "distill")
    if isinstance(data, Mapping):
        if unknown := [key for key in data if key not in keys]:
            near = difflib.get_close_matches(str(unknown[0]), keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(keys)}."
            raise DataError(
                f"The data factory {spec} returned a mapping with {list_names(data)}; "
                f"{unknown[0]!r} is unknown; {hint}"
            )
        parts, kind = {key: data.get(key) for key in keys}, f"a mapping with {list_names(data)}"
    else:
        parts, kind = {key: getattr(data, key, None) for key in keys}, f"a {type(data).__name__}"
    missing = [key for key in ("train", "val") if parts[key] is None]
    if missing:
        raise DataError(
            f"The data factory {spec} returned {kind}; {' and '.join(missing)} missing."
        )
    for key in ("loss", "distill"):
        if parts[key] is not None and not callable(parts[key]):
            raise DataError(
                f"The data factory {spec} returned a {key} that is no function of {ARGUMENTS[key]}."
            )
    return FactoryData(**parts)


@dataclass(frozen=True)
class FactoryBatches:
    """Makes batches of the splits of a factory's data.

    A TensorDataset stays in memory, any other map-style data set is read by worker processes, and
    other iterables give ready batches. Raises DataError if a split is none of these, has no length,
    or is empty.
    """

    spec: str  # the factory, for messages
    section: DataSection
    seed: int
    device: torch.device
    shard: Shard
    steps: int | None  # of the run, if limited: enough for training data without length

    def train(self, split: Any) -> tuple[Batches, Batches]:
        """Return the batches to train on, and the held-out ones (see `Data`)."""
        name = f"train of {self.spec}"
        if _is_iterable_only(split, name):
            ready = self._ready(split, name, "give --max-steps for data without end", self.steps)
            return ready, ready.held_out()
        train, held_out = split_held_out(_length(split, name), self.seed)
        return self._indexed(split, train, self.seed), self._indexed(split, held_out, None)

    def val(self, split: Any) -> Batches:
        """Return the batches of the evaluation data, in order."""
        name = f"val of {self.spec}"
        if _is_iterable_only(split, name):
            return self._ready(split, name, "give evaluation data an end")
        return self._indexed(split, torch.arange(_length(split, name)), None)

    def _ready(self, split: Any, name: str, remedy: str, steps: int | None = None) -> ReadyBatches:
        if isinstance(split, IterableDataset) and _gives_samples(split):
            split = DataLoader(split, self.section.batch_size)
        batches = ReadyBatches(
            split,
            self.device,
            seed=self.seed,
            shard=self.shard,
            steps=steps,
            name=name,
            remedy=remedy,
        )
        if batches.samples == 0:
            raise DataError(f"{name} holds no samples.")
        return batches

    def _indexed(self, split: Any, indices: Tensor, order_seed: int | None) -> Batches:
        """Return batches of the samples at `indices` of a map-style data set."""
        batch_size = self.section.batch_size
        order = BatchOrder(len(indices), batch_size, order_seed, self.shard, indices)
        if isinstance(split, TensorDataset):
            return MemoryBatches(as_batch(split.tensors), order, self.device)
        workers = self.section.workers
        return LoadedBatches(split, order, self.device, seed=self.seed, workers=workers)


def _gives_samples(dataset: IterableDataset[Any]) -> bool:
    """True if an IterableDataset gives single samples, False if it gives batches.

    The tensors of a batch have a first dimension in common, which numbers lack.
    """
    first = next(iter(dataset), None)
    return first is not None and (has_numbers(first) or shared_length(first) is None)


def _is_iterable_only(split: Any, name: str) -> bool:
    """True for batches that a split gives ready-made, False for a map-style data set."""
    if not isinstance(split, IterableDataset) and hasattr(split, "__getitem__"):
        return False
    if not hasattr(split, "__iter__") or iter(split) is split:
        raise DataError(
            f"{name} is a {type(split).__name__}; give a data set, or batches that can be run "
            "through again."
        )
    return True


def _length(split: Any, name: str) -> int:
    if not hasattr(split, "__len__"):
        raise DataError(f"{name} has no length; give its class a __len__.")
    if len(split) == 0:
        raise DataError(f"{name} holds no samples.")
    return len(split)
