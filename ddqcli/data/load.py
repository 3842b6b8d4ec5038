"""Training and evaluation data as batches on the device, and how their outcome is judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ddqcli.data.augment import Preprocess
from ddqcli.data.batches import (
    WHOLE,
    Batches,
    BatchOrder,
    LoadedBatches,
    MemoryBatches,
    ReadyBatches,
    Shard,
)
from ddqcli.data.classification import Score, classification
from ddqcli.data.images import ImageFormat, Reader, choose_format, decode
from ddqcli.data.sources import (
    Source,
    call_factory,
    is_torchvision,
    open_folder,
    open_npz,
    open_torchvision,
)
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import DataSection

MEMORY_LIMIT = 2**30  # bytes, decoded, up to which a split is kept in memory
SMALL_VAL_BATCH = 500


@dataclass(frozen=True)
class Data:
    """What `load_data` gives."""

    train: Batches  # shuffled, augmented; drops the last incomplete batch unless it is the only one
    val: Batches  # in order, whole, no augmentation
    loss: Score  # (output, target) -> mean loss
    metric: Score  # (output, target) -> [B] scores in 0..1; a hit of the first class by default
    classes: tuple[str, ...] | None
    note: str  # one line: what was found, and the preprocessing in force
    augment: Preprocess | None = (
        None  # what `train` passes images through; None where samples come ready
    )
    own_loss: bool = False  # whether `loss` is the user's

    def fingerprint(self) -> str:
        """Tells whether a run goes on with the data it was begun with."""
        return f"{self.train.samples} {self.train.fingerprint()} {self.val.samples} {self.val.fingerprint()}"


def load_data(
    section: DataSection, *, seed: int, device: torch.device, shard: Shard = WHOLE
) -> Data:
    """The data that `section` names, deterministic in `seed`; of each batch, one process's shard.

    Raises DataError, UsageError.
    """
    if shard.count > section.batch_size:
        raise UsageError(
            f"A batch of {section.batch_size} is too small for {shard.count} processes; set data.batch_size."
        )
    source = section.source
    if not source:
        raise UsageError(
            "No data are named; set data.source to a folder, a .npz file, DATASET:ROOT or module:factory."
        )
    head, colon, tail = source.partition(":")
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".npz":
        try:
            found = open_folder(path) if path.is_dir() else open_npz(path)
        except OSError as error:
            raise DataError(
                f"{error.filename or path} cannot be read: {error.strerror}."
            ) from error
    elif colon and is_torchvision(head, tail):
        found = open_torchvision(head, str(Path(tail).expanduser()), section.kwargs)
    elif colon:
        return _from_factory(source, section, seed, device, shard)
    else:
        raise DataError(
            f"The data {source} do not exist; give a folder, a .npz file, DATASET:ROOT or module:factory."
        )
    loss, metric = classification(found.count, exact=found.classes is not None)
    make = _from_tensors if isinstance(found.train, TensorDataset) else _from_images
    train, val, note, augment = make(found, section, seed, device, shard)
    return Data(train, val, loss, metric, found.classes, note, augment)


def _from_images(
    source: Source, section: DataSection, seed: int, device: torch.device, shard: Shard
) -> tuple[Batches, Batches, str, Preprocess]:
    """Images: small ones with crops after padding, large ones with crops of random size; in memory if they fit."""
    form = choose_format(source, section)
    pad = section.pad if form.small else 0
    rank_seed = seed * shard.count + shard.rank
    fill, flip = (
        "black" if section.fill == "auto" else section.fill,
        section.flip is True,
    )  # until the model is asked
    augment = Preprocess(form.mean, form.std, device, seed=rank_seed, pad=pad, fill=fill, flip=flip)
    plain = Preprocess(form.mean, form.std, device)
    val_size = max(SMALL_VAL_BATCH, section.batch_size) if form.small else section.batch_size

    def batches(items: Any, order: BatchOrder, prepare: Preprocess, random_crop: bool) -> Batches:
        reader = Reader(items, form, random_crop=random_crop)
        if random_crop or len(items) * form.bytes > MEMORY_LIMIT:
            return LoadedBatches(
                reader, order, device, seed=seed, workers=section.workers, prepare=prepare
            )
        return MemoryBatches(*decode(reader), order, device, prepare)

    train = batches(
        source.train,
        BatchOrder(len(source.train), section.batch_size, seed, shard),
        augment,
        not form.small,
    )
    val = batches(source.val, BatchOrder(len(source.val), val_size, shard=shard), plain, False)
    return train, val, _note(source, form, section, train, val), augment


def _from_tensors(
    source: Source, section: DataSection, seed: int, device: torch.device, shard: Shard
) -> tuple[Batches, Batches, str, None]:
    """Inputs that are ready for the model: passed on as they are."""
    (inputs, targets), (val_inputs, val_targets) = source.train.tensors, source.val.tensors
    train = MemoryBatches(
        inputs, targets, BatchOrder(len(inputs), section.batch_size, seed, shard), device
    )
    val = MemoryBatches(
        val_inputs,
        val_targets,
        BatchOrder(len(val_inputs), section.batch_size, shard=shard),
        device,
    )
    shape = "x".join(str(side) for side in inputs.shape[1:])
    if val_inputs.shape[1:] != inputs.shape[1:]:
        raise DataError(
            f"{source.place}: training and evaluation images differ in shape; make them equal."
        )
    note = f"{_counts(source, train, val)}, float {shape}, passed on as they are: not normalised, not augmented"
    return train, val, note, None


def _from_factory(
    spec: str, section: DataSection, seed: int, device: torch.device, shard: Shard
) -> Data:
    """A user's own data, with their own loss and metric where given."""
    made = call_factory(spec, section.kwargs)
    size, workers = section.batch_size, section.workers

    def batches(part: Any, name: str, order_seed: int | None) -> Batches:
        ready: Batches
        if isinstance(part, torch.utils.data.IterableDataset) or not hasattr(part, "__getitem__"):
            if not hasattr(part, "__iter__") or iter(part) is part:
                kind = f"{name} of {spec} is a {type(part).__name__}"
                raise DataError(
                    f"{kind}; give a data set, or batches that can be run through again."
                )
            ready = ReadyBatches(part, device, seed=seed, shard=shard)
        elif not hasattr(part, "__len__"):
            raise DataError(f"{name} of {spec} has no length; give its class a __len__.")
        elif isinstance(part, TensorDataset) and len(part.tensors) == 2:
            ready = MemoryBatches(
                *part.tensors, BatchOrder(len(part), size, order_seed, shard), device
            )
        else:
            ready = LoadedBatches(
                part,
                BatchOrder(len(part), size, order_seed, shard),
                device,
                seed=seed,
                workers=workers,
            )
        if ready.samples == 0:
            raise DataError(f"{name} of {spec} holds no samples.")
        return ready

    train, val = batches(made["train"], "train", seed), batches(made["val"], "val", None)
    loss, metric = classification(None, exact=False)
    counts = f"{train.samples:,} train and {val.samples:,} evaluation samples"
    own = [name for name in ("loss", "metric") if made[name] is not None]
    note = f"{counts} from {spec}, prepared by it" + (
        f"; its own {' and '.join(own)}" if own else ""
    )
    metric = _one_a_sample(made["metric"], spec) if made["metric"] else metric
    return Data(
        train, val, made["loss"] or loss, metric, None, note, own_loss=made["loss"] is not None
    )


def _one_a_sample(metric: Score, spec: str) -> Score:
    def checked(output: Any, target: Tensor) -> Tensor:
        scores = metric(output, target)
        if not isinstance(scores, Tensor) or scores.shape != target.shape[:1]:
            kind = (
                f"shape {list(scores.shape)}"
                if isinstance(scores, Tensor)
                else f"a {type(scores).__name__}"
            )
            raise DataError(
                f"The metric of {spec} returned {kind}; {len(target)} scores are needed, one a sample."
            )
        return scores

    return checked


def _counts(source: Source, train: Batches, val: Batches) -> str:
    classes = f" of {source.count:,} classes" if source.count else ""
    return f"{train.samples:,} train and {val.samples:,} evaluation images{classes} from {source.place}"


def _note(
    source: Source, form: ImageFormat, section: DataSection, train: Batches, val: Batches
) -> str:
    height, width = form.shape
    size = f"{width}x{height}" + (
        ", grey" if form.mode == "L" else ", grey read as RGB" if form.widened else ""
    )
    if form.resize:
        size = f"resized to {form.resize}, {size}"
    kept = {
        MemoryBatches: "kept in memory",
        LoadedBatches: f"read by {section.workers} processes as needed",
    }
    kinds = list(dict.fromkeys(kept[type(part)] for part in (train, val)))  # type: ignore[index]
    values = [" ".join(f"{value:g}" for value in part) for part in (form.mean, form.std)]
    colour = "" if section.fill == "auto" else f" with {section.fill}"
    steps = [f"crops after padding by {section.pad}{colour}"] if form.small and section.pad else []
    steps += [] if form.small else ["crops of random size and place"]
    steps += {True: ["flips"], "auto": ["flips if the model knows them"]}.get(section.flip, [])
    return (
        f"{_counts(source, train, val)}, {size}, {' and '.join(kinds)}; mean {values[0]}, std {values[1]}; "
        f"training with {' and '.join(steps) or 'no augmentation'}"
    )
