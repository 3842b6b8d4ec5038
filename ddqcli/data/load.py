"""Load the data that a recipe names, with the loss and metric that judge a model's outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import TensorDataset

from ddqcli.data.augment import Preprocess
from ddqcli.data.batches import WHOLE, Batch, Batches, BatchOrder, Shard, as_batch
from ddqcli.data.classification import Score, classification
from ddqcli.data.data_factory import FactoryBatches, call_factory
from ddqcli.data.held_out import split_held_out
from ddqcli.data.image_folder import open_folder
from ddqcli.data.image_format import choose_format
from ddqcli.data.images import ImageFormat, ImageReader
from ddqcli.data.loaded_batches import LoadedBatches
from ddqcli.data.memory_batches import MemoryBatches
from ddqcli.data.metric import own_metrics
from ddqcli.data.npz import open_npz
from ddqcli.data.own_loss import own_loss
from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.data.source import Source
from ddqcli.data.torchvision_sets import is_torchvision, open_torchvision
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.factory import missing_function
from ddqcli.recipe.schema import DataSection
from ddqcli.runs.evaluation import Metric

MEMORY_LIMIT = 2**30  # bytes of decoded images up to which a split is kept in memory
_SMALL_VAL_BATCH = 500  # samples; small images fit in larger batches for evaluation


@dataclass(frozen=True)
class Data:
    """Training and evaluation data, and the functions that judge outputs on them.

    Of n training samples, min(512, n / 8) are held out: drawn at random with the seed, never
    trained on, in order and not augmented. There are two exceptions. Fewer than 8 training samples
    are all trained on and held out, too. Ready batches, such as a DataLoader's, cannot leave
    samples out: held out are the first ones of a pass of its own, which training also sees.
    """

    train: Batches  # shuffled and augmented, without the last incomplete batch
    held_out: Batches
    val: Batches  # in order, complete, not augmented
    loss: Score  # (output, target) -> mean loss
    metric: Score  # (output, target) -> scores [B]; top-1 hits by default
    classes: tuple[str, ...] | None  # names, if known
    note: str  # one line: the data found, and the preprocessing in force
    augment: Preprocess | None = None  # of `train`; None if samples come ready for the model
    own_loss: bool = False  # True if `loss` is the user's
    own_metric: bool = False  # True if `metric` is
    judged_by: Metric = field(default_factory=Metric)  # name, unit and direction of `metric`
    distill: Score | None = None  # the user's own distillation: (output, teacher's output) -> loss
    others: tuple[tuple[Score, Metric], ...] = ()  # the user's metrics that decide nothing
    labelled: bool = True  # False if the float model's outputs stand for targets

    def fingerprint(self) -> str:
        """Return a text that differs for other data, to check that a run resumes with its own.

        The training data's fingerprint covers the held-out samples.
        """
        train, val = self.train, self.val
        return f"{train.samples} {train.fingerprint()} {val.samples} {val.fingerprint()}"


def load_data(
    section: DataSection,
    *,
    seed: int,
    device: torch.device,
    shard: Shard = WHOLE,
    max_steps: int | None = None,
) -> Data:
    """Return the data that `section` names, deterministic in `seed`.

    Batches hold the `shard` of one process. `max_steps` is the limit of the run, which training
    data without length need. Raises UsageError if the section names no data,
    DataError if they cannot be read or used.
    """
    if shard.count > section.batch_size:
        raise UsageError(
            f"A batch of {section.batch_size} is too small for {shard.count} processes; set "
            "data.batch_size."
        )
    source = open_source(section)
    if source is None:
        return _factory_data(section, seed, device, shard, max_steps)
    loss, metric = classification(source.count, exact=source.classes is not None)
    load = _tensor_batches if isinstance(source.train, TensorDataset) else _image_batches
    splits, note, augment = load(source, section, seed, device, shard)
    return Data(*splits, loss, metric, source.classes, note, augment)


def open_source(section: DataSection) -> Source | None:
    """Open a folder, .npz file or data set of torchvision; None if the section names a factory."""
    named = section.require_source()
    path = Path(named).expanduser()
    if path.is_dir() or path.suffix == ".npz":
        try:
            return open_folder(path) if path.is_dir() else open_npz(path)
        except OSError as error:
            raise DataError(
                f"{error.filename or path} cannot be read: {error.strerror}."
            ) from error
    name, colon, root = named.partition(":")
    if colon and is_torchvision(name, root):
        return open_torchvision(name, str(Path(root).expanduser()), section.kwargs)
    if colon:
        return None
    if path.suffix == ".py":
        raise DataError(missing_function(path))
    raise DataError(
        f"The data {named} do not exist; give a folder, a .npz file, DATASET:ROOT or "
        "module:factory."
    )


class _Splits(NamedTuple):
    train: Batches
    held_out: Batches
    val: Batches


class _Orders(NamedTuple):
    train: BatchOrder
    held_out: BatchOrder
    val: BatchOrder


def _orders(
    source: Source, batch_size: int, plain_batch_size: int, seed: int, shard: Shard
) -> _Orders:
    """Return the order of each split; held-out samples are a part of `source.train`."""
    train, held_out = split_held_out(len(source.train), seed)
    return _Orders(
        BatchOrder(len(train), batch_size, seed, shard, train),
        BatchOrder(len(held_out), plain_batch_size, None, shard, held_out),
        BatchOrder(len(source.val), plain_batch_size, None, shard),
    )


def _image_batches(
    source: Source, section: DataSection, seed: int, device: torch.device, shard: Shard
) -> tuple[_Splits, str, Preprocess]:
    """Return the batches of all splits, a note, and the preprocessing of training images.

    Small images are cropped after padding, large ones by random resized crops. A split is kept in
    memory if it fits and needs no random resized crops; held-out images are those of the training
    split.
    """
    image_format = choose_format(source, section)
    small = image_format.small
    augment = Preprocess(
        image_format.mean,
        image_format.std,
        device,
        seed=seed * shard.count + shard.rank,
        pad=section.pad if small else 0,
        # `auto` is decided later, from the model.
        fill="black" if section.fill == "auto" else section.fill,
        flip=section.flip is True,
    )
    plain = Preprocess(image_format.mean, image_format.std, device)

    def decode(reader: ImageReader) -> Batch | None:
        fits = len(reader) * image_format.bytes <= MEMORY_LIMIT
        return reader.read_all() if fits and not reader.random_crop else None

    def batches(
        reader: ImageReader, decoded: Batch | None, order: BatchOrder, prepare: Preprocess
    ) -> Batches:
        if decoded:
            return MemoryBatches(decoded, order, device, prepare)
        workers = section.workers
        return LoadedBatches(reader, order, device, seed=seed, workers=workers, prepare=prepare)

    val_size = max(_SMALL_VAL_BATCH, section.batch_size) if small else section.batch_size
    orders = _orders(source, section.batch_size, val_size, seed, shard)
    train = ImageReader(source.train, image_format, random_crop=not small)
    held_out, val = (ImageReader(images, image_format) for images in (source.train, source.val))
    decoded = decode(train)
    splits = _Splits(
        batches(train, decoded, orders.train, augment),
        batches(held_out, decoded, orders.held_out, plain),
        batches(val, decode(val), orders.val, plain),
    )
    return splits, _image_note(source, image_format, section, splits), augment


def _tensor_batches(
    source: Source, section: DataSection, seed: int, device: torch.device, shard: Shard
) -> tuple[_Splits, str, None]:
    """Return the batches of inputs that are ready for the model, and a note."""
    train, val = as_batch(source.train.tensors), as_batch(source.val.tensors)
    shape, val_shape = train[0].shape[1:], val[0].shape[1:]
    if val_shape != shape:
        raise DataError(
            f"{source.location}: training and evaluation images differ in shape; make them equal."
        )
    orders = _orders(source, section.batch_size, section.batch_size, seed, shard)
    parts = zip((train, train, val), orders, strict=True)
    splits = _Splits(*(MemoryBatches(data, order, device) for data, order in parts))
    note = (
        f"{_image_counts(source, splits)}, float {'x'.join(map(str, shape))}, passed on as they "
        "are: not normalized, not augmented"
    )
    return splits, note, None


def _factory_data(
    section: DataSection, seed: int, device: torch.device, shard: Shard, max_steps: int | None
) -> Data:
    """Return a user's own data, with their loss and metric if given."""
    spec = section.source or ""
    data = call_factory(spec, section.kwargs)
    batches = FactoryBatches(spec, section, seed, device, shard, max_steps)
    splits = _Splits(*batches.train(data.train), batches.val(data.val))
    loss, metric = classification(None, exact=False, own_loss=data.loss is not None)
    judged_by, others = Metric(), list[tuple[Score, Metric]]()
    if data.metric is not None:
        (metric, judged_by), *others = own_metrics(data.metric, spec)
    own = [name for name in ("loss", "metric", "distill") if getattr(data, name) is not None]
    note = f"{_counts(splits)} samples from {spec}, prepared by it"
    note += f"; its own {' and '.join(own)}" if own else ""
    return Data(
        *splits,
        loss=own_loss(data.loss, spec) if data.loss is not None else loss,
        metric=metric,
        classes=None,
        note=note,
        own_loss=data.loss is not None,
        own_metric=data.metric is not None,
        judged_by=judged_by,
        distill=own_loss(data.distill, spec, "distill") if data.distill is not None else None,
        others=tuple(others),
    )


def _image_counts(source: Source, splits: _Splits) -> str:
    classes = f" of {source.count:,} classes" if source.count else ""
    return f"{_counts(splits)} images{classes} from {source.location}"


def _counts(splits: _Splits) -> str:
    train, held_out, val = (f"{part.samples:,}" for part in splits)
    if splits.train.samples == splits.held_out.samples:  # too few to hold any out
        return f"{train} train and {val} evaluation"
    if isinstance(splits.train, ReadyBatches):
        train = "an unknown number of" if splits.train.repeats else train
        return f"{train} train ({held_out} of them also held-out) and {val} evaluation"
    return f"{train} train, {held_out} held-out and {val} evaluation"


def _image_note(
    source: Source,
    image_format: ImageFormat,
    section: DataSection,
    splits: _Splits,
) -> str:
    height, width = image_format.shape
    size = f"{width}x{height}"
    if image_format.mode == "L":
        size += ", gray"
    elif image_format.gray_as_rgb:
        size += ", gray read as RGB"
    if image_format.resize:
        size = f"resized to {image_format.resize}, {size}"
    parts = (splits.train, splits.val)
    storage = " and ".join(dict.fromkeys(_storage_note(part, section) for part in parts))
    mean, std = (
        " ".join(f"{v:g}" for v in values) for values in (image_format.mean, image_format.std)
    )
    return (
        f"{_image_counts(source, splits)}, {size}, {storage}; mean {mean}, std {std}; "
        f"training with {_augmentation_note(image_format, section)}"
    )


def _storage_note(batches: Batches, section: DataSection) -> str:
    if isinstance(batches, MemoryBatches):
        return "kept in memory"
    return f"read by {section.workers} processes as needed"


def _augmentation_note(image_format: ImageFormat, section: DataSection) -> str:
    steps = []
    if not image_format.small:
        steps.append("crops of random size and place")
    elif section.pad:
        color = "" if section.fill == "auto" else f" with {section.fill}"
        steps.append(f"crops after padding by {section.pad}{color}")
    if section.flip is True:
        steps.append("flips")
    elif section.flip == "auto":
        steps.append("flips if the model knows them")
    return " and ".join(steps) or "no augmentation"
