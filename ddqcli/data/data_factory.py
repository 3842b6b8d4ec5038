"""A user's own data: the function that a recipe names, and the batches of what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from ddqcli.data.batches import Batches, BatchOrder, Shard, as_batch
from ddqcli.data.classification import Score
from ddqcli.data.loaded_batches import LoadedBatches
from ddqcli.data.memory_batches import MemoryBatches
from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.data.source import list_names
from ddqcli.errors import DataError, DDQError
from ddqcli.recipe.factory import import_factory
from ddqcli.recipe.schema import DataSection


@dataclass(frozen=True)
class FactoryData:
    """The result of a data factory: a mapping or an object with these names."""

    train: Any  # a data set, or re-iterable batches
    val: Any
    loss: Score | None  # (output, target) -> mean loss
    metric: Score | None  # (output, target) -> one score [B] for each sample


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
    keys = ("train", "val", "loss", "metric")
    if isinstance(data, Mapping):
        parts, kind = {key: data.get(key) for key in keys}, f"a mapping with {list_names(data)}"
    else:
        parts, kind = {key: getattr(data, key, None) for key in keys}, f"a {type(data).__name__}"
    missing = [key for key in ("train", "val") if parts[key] is None]
    if missing:
        raise DataError(
            f"The data factory {spec} returned {kind}; {' and '.join(missing)} missing."
        )
    for key in ("loss", "metric"):
        if parts[key] is not None and not callable(parts[key]):
            raise DataError(
                f"The data factory {spec} returned a {key} that is no function of (output, target)."
            )
    return FactoryData(**parts)


def factory_batches(
    split: Any,
    name: str,
    section: DataSection,
    *,
    seed: int,
    shuffle: bool,
    device: torch.device,
    shard: Shard,
) -> Batches:
    """Return the batches of one split of a factory's data.

    A TensorDataset stays in memory, any other map-style data set is read by worker processes, and
    other iterables give ready batches. `name` is for messages. Raises DataError if `split` is none
    of these, has no length, or is empty.
    """
    batches: Batches
    if isinstance(split, IterableDataset) or not hasattr(split, "__getitem__"):
        if not hasattr(split, "__iter__") or iter(split) is split:
            raise DataError(
                f"{name} is a {type(split).__name__}; give a data set, or batches that can be run "
                "through again."
            )
        batches = ReadyBatches(split, device, seed=seed, shard=shard)
    elif not hasattr(split, "__len__"):
        raise DataError(f"{name} has no length; give its class a __len__.")
    else:
        order = BatchOrder(len(split), section.batch_size, seed if shuffle else None, shard)
        if isinstance(split, TensorDataset) and len(split.tensors) == 2:
            batches = MemoryBatches(as_batch(split.tensors), order, device)
        else:
            workers = section.workers
            batches = LoadedBatches(split, order, device, seed=seed, workers=workers)
    if batches.samples == 0:
        raise DataError(f"{name} holds no samples.")
    return batches


def check_scores(metric: Score, spec: str) -> Score:
    """Wrap a factory's metric: raise DataError if it does not return one score for each sample."""

    def checked(output: Any, target: Tensor) -> Tensor:
        scores = metric(output, target)
        if not isinstance(scores, Tensor) or scores.shape != target.shape[:1]:
            is_tensor = isinstance(scores, Tensor)
            kind = f"shape {list(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
            raise DataError(
                f"The metric of {spec} returned {kind}; {len(target)} scores are needed, one a "
                "sample."
            )
        return scores

    return checked
