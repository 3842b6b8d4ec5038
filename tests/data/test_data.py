"""Data: batches repeat and resume, augmentation and normalisation agree with torchvision and float64, faults are said."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_weight

from ddqcli.data import load as data_module
from ddqcli.data.augment import flip_images, normalize_images, random_crops
from ddqcli.data.batches import BatchOrder, LoadedBatches, MemoryBatches, ReadyBatches
from ddqcli.data.classification import classification
from ddqcli.data.load import Data, load_data
from ddqcli.data.seeding import seeded
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import IMAGENET_MEAN, IMAGENET_STD, DataSection
from ddqcli.training.detect_augmentation import detect_padding_fill, is_flip_invariant

CPU = torch.device("cpu")
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
MEAN, STD = (
    torch.tensor(IMAGENET_MEAN, dtype=torch.float64),
    torch.tensor(IMAGENET_STD, dtype=torch.float64),
)
rng = np.random.default_rng(0)


def load(source: Path | str, seed: int = 0, **fields: Any) -> Data:
    return load_data(
        DataSection(source=str(source), **{"workers": 0, **fields}), seed=seed, device=CPU
    )


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def write_npz(path: Path, **arrays: Any) -> Path:
    """30 training and 7 test images 6x5 of 3 classes, with `arrays` in place of or beside the usual ones (None: left out)."""
    usual = {
        "x_train": pixels(30, 6, 5, 3),
        "y_train": np.arange(30) % 3,
        "x_test": pixels(7, 6, 5, 3),
        "y_test": np.arange(7) % 3,
    }
    np.savez(
        path, **{key: value for key, value in {**usual, **arrays}.items() if value is not None}
    )
    return path


def write_folder(
    root: Path, split: str = "val", mode: str = "RGB", size: tuple[int, int] = (6, 5), each: int = 3
) -> Path:
    for part, name, number in itertools.product(("train", split), ("ant", "bee"), range(each)):
        file = root / part / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(size[1], size[0], 3)).convert(mode).save(file)
    return root


def reference(image: Image.Image) -> Tensor:
    """What the model is to see of an image: float64 [C,H,W]."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return (values - MEAN[:, None, None]) / STD[:, None, None]


# ----------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("fill", [(0, 0, 0), (124, 116, 104)], ids=str)
def test_crops_and_flips_agree_with_torchvision_sample_by_sample(fill):
    images = torch.from_numpy(pixels(40, 7, 9, 3))
    tops, lefts = torch.randint(0, 7, (2, 40))
    flips = torch.rand(40) < 0.5
    colour = torch.tensor(fill, dtype=torch.uint8)
    result = flip_images(random_crops(images, 3, tops, lefts, colour), flips)
    for image, top, left, flip, got in zip(
        images, tops.tolist(), lefts.tolist(), flips, result, strict=True
    ):
        padded = torch.stack(
            [
                TF.pad(channel, [3], value)
                for channel, value in zip(image.permute(2, 0, 1), fill, strict=True)
            ]
        )
        expected = TF.crop(padded, top, left, 7, 9)
        expected = TF.hflip(expected) if flip else expected
        assert torch.equal(got.permute(2, 0, 1), expected)


def test_normalisation_is_torchvisions_and_that_of_float64():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    result = normalize_images(images, MEAN.float(), STD.float())
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        result[1], TF.normalize(TF.to_tensor(images[1].numpy()), IMAGENET_MEAN, IMAGENET_STD)
    )
    exact = (images.double() / 255 - MEAN) / STD
    assert (result - exact.permute(0, 3, 1, 2)).abs().max() < 1e-6


def test_training_images_are_shifted_by_up_to_pad_and_mirrored_on_black(tmp_path):
    shift, labels = 2, np.arange(60)
    images = pixels(60, 6, 5, 3)
    path = write_npz(tmp_path / "a.npz", x_train=images, y_train=labels)
    variants_seen = set()
    for inputs, targets in load(path, pad=shift, flip=True, batch_size=20).train.epoch(0):
        for got, target in zip(inputs, targets.tolist(), strict=True):
            padded = np.pad(images[target], ((shift, shift), (shift, shift), (0, 0)))
            matches = []
            for top, left, flip in itertools.product(range(5), range(5), (1, -1)):
                variant = padded[top : top + 6, left : left + 5][:, ::flip]
                if (reference(Image.fromarray(variant)) - got).abs().max() < 1e-6:
                    matches.append((top, left, flip))
            assert len(matches) == 1
            variants_seen.update(matches)
    assert (
        {top for top, _, _ in variants_seen}
        == {left for _, left, _ in variants_seen}
        == set(range(5))
    )
    assert {flip for _, _, flip in variants_seen} == {1, -1}


def test_without_pad_and_flip_training_images_are_whole(tmp_path):
    images = pixels(30, 6, 5, 3)
    data = load(
        write_npz(tmp_path / "a.npz", x_train=images, y_train=np.arange(30)),
        pad=0,
        flip=False,
        batch_size=30,
    )
    inputs, targets = next(data.train.epoch(0))
    for got, target in zip(inputs, targets, strict=True):
        assert (reference(Image.fromarray(images[target])) - got).abs().max() < 1e-6
    assert data.note.endswith("no augmentation")


def test_seeded_repeats_inside_and_changes_nothing_outside():
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with seeded("a", 1):
        first = draws()
    with seeded("a", 1):
        again = draws()
    with seeded("a", 2):
        other = draws()
    assert first == again
    assert not set(first) & set(other)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


# ----------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("samples", "size", "batches"), [(30, 7, 4), (28, 7, 4), (5, 7, 1)])
def test_training_order_holds_each_sample_at_most_once_in_whole_batches(samples, size, batches):
    order = BatchOrder(samples, size, seed=3)
    epochs = [torch.cat(order.batches(epoch)) for epoch in (0, 1)]
    assert len(order) == len(order.batches(0)) == batches
    for indices in epochs:
        assert len(indices) == len(indices.unique()) == min(samples, batches * size)
        assert indices.min() >= 0
        assert indices.max() < samples
    assert not torch.equal(*epochs)


def test_evaluation_runs_through_every_sample_once_in_order():
    order = BatchOrder(30, 7)
    assert len(order) == 5
    assert torch.equal(torch.cat(order.batches(9)), torch.arange(30))


class Noisy(Dataset):
    """Adds noise from every global generator, as transforms do."""

    read: list[int]

    def __init__(self, length: int = 22) -> None:
        self.length, self.read = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return index + torch.rand(3) + random.random() + float(np.random.rand()), index % 3


def make_batches(kind: str, tmp_path: Path, seed: int) -> Any:
    if kind == "memory":
        return load(write_npz_once(tmp_path), seed=seed, batch_size=5).train
    if kind == "random crops":
        folder = tmp_path / "large"
        return load(
            folder if folder.exists() else write_folder(folder, size=(150, 140), each=6),
            seed,
            batch_size=3,
        ).train
    if kind == "ready":
        return ReadyBatches(DataLoader(Noisy(), batch_size=5, shuffle=True), CPU, seed=seed)
    workers = 2 if kind == "two workers" else 0
    return LoadedBatches(Noisy(), BatchOrder(22, 5, seed), CPU, seed=seed, workers=workers)


def write_npz_once(folder: Path) -> Path:
    return folder / "a.npz" if (folder / "a.npz").exists() else write_npz(folder / "a.npz")


def same(left: list[Any], right: list[Any]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("kind", ["memory", "random crops", "loaded", "two workers", "ready"])
def test_batches_hang_on_seed_and_epoch_alone_and_resume_anywhere(kind, tmp_path):
    torch.manual_seed(1)
    whole = list(make_batches(kind, tmp_path, 7).epoch(2))
    torch.manual_seed(2)
    random.seed(2)
    before = torch.get_rng_state()
    batches = make_batches(kind, tmp_path, 7)
    assert same(list(batches.epoch(2)), whole)
    assert same(list(batches.epoch(2, start=2)), whole[2:])
    assert list(batches.epoch(2, start=len(batches))) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert len(whole) == len(batches)
    assert not same(list(batches.epoch(3)), whole)
    assert not same(list(make_batches(kind, tmp_path, 8).epoch(2)), whole)


def test_the_number_of_workers_changes_nothing(tmp_path):
    none, two = (make_batches(kind, tmp_path, 5) for kind in ("loaded", "two workers"))
    assert same(list(none.epoch(1)), list(two.epoch(1)))


def test_a_fingerprint_tells_other_data_of_a_file_from_these(tmp_path):
    usual = {"x_train": pixels(30, 6, 5, 3), "x_test": pixels(7, 6, 5, 3)}
    one_pixel, swapped = (usual["x_train"].copy() for _ in range(2))
    one_pixel[17, 3, 2, 1] ^= 1
    swapped[[4, 5]] = swapped[[5, 4]]
    changes = [{}, {"x_train": one_pixel}, {"x_train": swapped}, {"y_test": np.arange(7) % 2}]
    prints = [
        load(write_npz(tmp_path / "a.npz", **{**usual, **change})).fingerprint()
        for change in changes
    ]
    assert len(set(prints)) == 4
    again = load(write_npz(tmp_path / "b.npz", **usual), seed=5, batch_size=3, flip=False)
    assert again.fingerprint() == prints[0], "which hangs on the data alone"


@pytest.mark.parametrize("kind", ["memory", "read", "two workers", "ready"])
def test_a_fingerprint_of_a_factorys_data_stands_small_changes_of_the_last_bits_only(kind):
    def batches(images: Tensor, targets: Tensor) -> Any:
        order, pairs = BatchOrder(len(images), 8), list(zip(images, targets, strict=True))
        if kind == "memory":
            return MemoryBatches(images, targets, order, CPU)
        if kind == "ready":
            return ReadyBatches(DataLoader(pairs, 50, shuffle=True), CPU, seed=0)
        return LoadedBatches(pairs, order, CPU, seed=0, workers=2 if kind == "two workers" else 0)

    images, targets = torch.randn(50, 3, 4, 4), torch.arange(50) % 3
    images -= images.mean()
    print_ = batches(images, targets).fingerprint()
    assert batches(images * (1 + 1e-6) + 1e-8, targets).fingerprint() == print_
    for other in ((images.roll(1, 0), targets), (images * 1.1, targets), (images, targets.roll(1))):
        assert batches(*other).fingerprint() != print_


def test_samples_that_are_drawn_anew_each_time_have_no_fingerprint_of_their_own():
    class Drawn(Dataset):
        def __init__(self, seed: int) -> None:
            self.random = np.random.default_rng(seed)  # which no seeding from outside reaches

        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.from_numpy(self.random.normal(size=4)), index % 3

    def print_(seed: int) -> str:
        return LoadedBatches(Drawn(seed), BatchOrder(9, 3), CPU, seed=0, workers=0).fingerprint()

    assert print_(1) == print_(2)


def test_starting_late_reads_no_earlier_sample():
    samples, order = Noisy(), BatchOrder(22, 5, seed=0)
    batches = LoadedBatches(samples, order, CPU, seed=0, workers=0)
    assert len(list(batches.epoch(0, start=3))) == 1
    assert samples.read == order.batches(0)[3].tolist()


@pytest.mark.parametrize("drop_last", [False, True])
def test_ready_batches_count_their_samples(drop_last):
    loader = DataLoader(Noisy(), batch_size=5, drop_last=drop_last)
    counted = ReadyBatches(loader, CPU, seed=0)
    passed = ReadyBatches([batch for batch in loader], CPU, seed=0)
    expected = (4, 20) if drop_last else (5, 22)
    assert (len(counted), counted.samples) == (len(passed), passed.samples) == expected


# ----------------------------------------------------------------------------------------------------------- sources


def test_folder_of_small_images(tmp_path):
    data = load(write_folder(tmp_path), flip=True, batch_size=4)
    assert data.classes == ("ant", "bee")
    assert (len(data.train), data.train.samples, data.val.samples) == (1, 6, 6)
    (inputs, targets), *more = data.val.epoch(0)
    assert not more
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    files = sorted((tmp_path / "val").glob("*/*.png"))
    assert (
        inputs - torch.stack([reference(Image.open(file)) for file in files])
    ).abs().max() < 1e-6
    assert data.note == (
        f"6 train and 6 evaluation images of 2 classes from {tmp_path} (val/ for evaluation), 6x5, kept in memory; "
        "mean 0.485 0.456 0.406, std 0.229 0.224 0.225; training with crops after padding by 4 and flips"
    )


def test_folder_with_test_in_place_of_val(tmp_path):
    assert "(test/ for evaluation)" in load(write_folder(tmp_path, "test")).note


def test_small_images_beyond_memory_are_read_as_needed_and_the_same(tmp_path, monkeypatch):
    write_folder(tmp_path, each=5)
    kept = load(tmp_path, batch_size=4)
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 100)
    read = load(tmp_path, batch_size=4)
    assert isinstance(kept.train, MemoryBatches)
    assert isinstance(read.train, LoadedBatches)
    assert same(list(kept.train.epoch(1)), list(read.train.epoch(1)))
    assert same(list(kept.val.epoch(0)), list(read.val.epoch(0)))
    assert "kept in memory" in kept.note
    assert "read by 0 processes" in read.note


def test_large_images_are_resized_and_cropped_as_their_weights_were_trained(tmp_path):
    write_folder(tmp_path, size=(300, 260), each=2)
    data = load(tmp_path, weights="ResNet18_Weights.IMAGENET1K_V1", flip=True, batch_size=2)
    preset = get_weight("ResNet18_Weights.IMAGENET1K_V1").transforms()
    files = sorted((tmp_path / "val").glob("*/*.png"))
    got = torch.cat([inputs for inputs, _ in data.val.epoch(0)])
    assert (got - torch.stack([preset(Image.open(file)) for file in files])).abs().max() < 1e-5
    assert [tuple(inputs.shape) for inputs, _ in data.train.epoch(0)] == [(2, 3, 224, 224)] * 2
    assert "resized to 256, 224x224" in data.note
    assert "crops of random size and place and flips" in data.note


def test_weights_bring_their_own_numbers_and_the_section_may_set_the_size(tmp_path):
    write_folder(tmp_path, size=(300, 260), each=1)
    note = load(
        tmp_path, weights="ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", resize=160, crop=144
    ).note
    assert "resized to 160, 144x144" in note
    with pytest.raises(UsageError, match="has its own mean and std"):
        load(tmp_path, weights="ResNet18_Weights.IMAGENET1K_V1", mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UsageError, match=r"ResNet18_Weights\.NONE is not known"):
        load(tmp_path, weights="ResNet18_Weights.NONE")


def test_mixed_sizes_can_be_brought_to_one(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(pixels(20, 30, 3)).save(tmp_path / "train" / "ant" / "0.png")
    with pytest.raises(
        DataError,
        match=r"where others are .*; bring all to one size with data.resize and data.crop",
    ):
        load(tmp_path)
    inputs, _ = next(load(tmp_path, resize=5, crop=4).train.epoch(0))
    assert inputs.shape == (6, 3, 4, 4)


def test_grey_images_keep_one_channel_or_become_three_on_request(tmp_path):
    write_folder(tmp_path, mode="L")
    with pytest.raises(DataError, match=r"--set data\.mean="):
        load(tmp_path)
    inputs, _ = next(load(tmp_path, mean=[0.25], std=[0.5]).val.epoch(0))
    image = np.array(Image.open(tmp_path / "val" / "ant" / "0.png"))
    assert np.abs(inputs[0, 0].numpy() - (image / 255 - 0.25) / 0.5).max() < 1e-6
    data = load(tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    inputs, _ = next(data.val.epoch(0))
    assert inputs.shape == (6, 3, 5, 6)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    assert "grey read as RGB" in data.note


@pytest.mark.parametrize(
    "names", [("x_test", "y_test"), ("x_val", "y_val"), ("val_images", "val_labels")]
)
def test_npz_by_either_set_of_names(names, tmp_path):
    images, train = pixels(4, 8, 8), "train_images" if "images" in names[0] else "x_train"
    arrays: dict[str, Any] = {"x_train": None, "y_train": None, "x_test": None, "y_test": None}
    arrays |= {
        train: pixels(6, 8, 8),
        train.replace("x_", "y_").replace("images", "labels"): np.arange(6)[:, None] % 2,
    }
    arrays |= {names[0]: images, names[1]: np.array([[1], [0], [0], [1]], dtype=np.uint8)}
    data = load(write_npz(tmp_path / "a.npz", **arrays), mean=[0.5], std=[0.5])
    ((inputs, targets),) = data.val.epoch(0)
    assert torch.equal(inputs, (torch.from_numpy(images)[:, None].float() / 255 - 0.5) / 0.5)
    assert targets.tolist() == [1, 0, 0, 1]
    assert "of 2 classes" in data.note
    assert f"({names[0]} for evaluation), 8x8, grey" in data.note


def test_npz_of_float_images_is_passed_on_as_it_is(tmp_path):
    images = rng.normal(size=(8, 2, 4, 4))
    path = write_npz(
        tmp_path / "a.npz", x_train=images, y_train=np.arange(8), x_test=images, y_test=np.arange(8)
    )
    data = load(path, batch_size=8)
    ((inputs, targets),) = data.train.epoch(0)
    assert torch.equal(inputs, torch.from_numpy(images).float()[targets])
    assert "not normalised, not augmented" in data.note


def test_npz_keeps_the_size_of_large_images(tmp_path):
    path = write_npz(
        tmp_path / "a.npz", x_train=pixels(30, 140, 140, 3), x_test=pixels(7, 140, 140, 3)
    )
    inputs, _ = next(load(path).val.epoch(0))
    assert inputs.shape == (7, 3, 140, 140)


def write_mnist(root: Path) -> np.ndarray:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = {"train": pixels(20, 28, 28), "t10k": pixels(10, 28, 28)}
    for name, array in images.items():
        head = [
            np.array([2051, *array.shape], ">i4").tobytes(),
            np.array([2049, len(array)], ">i4").tobytes(),
        ]
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head[0] + array.tobytes())
        labels = (np.arange(len(array)) % 10).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head[1] + labels.tobytes())
    return images["t10k"]


def test_torchvision_set_with_a_train_argument(tmp_path):
    images = write_mnist(tmp_path)
    data = load(f"MNIST:{tmp_path}", mean=[0.0], std=[1.0])
    ((inputs, targets),) = data.val.epoch(0)
    assert torch.equal(inputs[:, 0], torch.from_numpy(images).float() / 255)
    assert targets.tolist() == list(range(10))
    assert data.train.samples == 20
    assert data.classes is not None
    assert len(data.classes) == 10


def test_torchvision_set_with_a_split_argument(tmp_path):
    names = {"n01": ("ant", "emmet"), "n02": ("bee",)}
    torch.save((names, []), tmp_path / "meta.bin")
    for split, wnid in itertools.product(("train", "val"), names):
        (tmp_path / split / wnid).mkdir(parents=True)
        Image.fromarray(pixels(150, 140, 3)).save(tmp_path / split / wnid / "a.jpg")
    data = load(f"ImageNet:{tmp_path}", batch_size=2)
    assert data.classes == ("ant", "bee")
    assert "(val for evaluation), resized to 256, 224x224" in data.note
    ((inputs, targets),) = data.val.epoch(0)
    assert inputs.shape == (2, 3, 224, 224)
    assert targets.tolist() == [0, 1]


FACTORY = """
import torch
from torch.utils.data import DataLoader, TensorDataset

class Squares:
    def __len__(self): return 6
    def __getitem__(self, index):
        if index == 4 and broken: raise ValueError("no square of four")
        return torch.tensor([float(index) ** 2]), index % 2

broken = False

def plain(scale=1.0):
    x, y = torch.arange(6.0)[:, None] * scale, torch.arange(6) % 2
    return {"train": TensorDataset(x, y), "val": DataLoader(TensorDataset(x, y), batch_size=4)}

def own():
    class Made:
        train, val = Squares(), Squares()
        loss = staticmethod(lambda output, target: (output - target).abs().mean())
        metric = staticmethod(lambda output, target: 1.0 - (output - target).abs())
    return Made()

def damaged():
    global broken
    broken = True
    return {"train": Squares(), "val": Squares()}

def nothing(): pass
def raises(): raise RuntimeError("the disk is away")
def lacking(): return {"train": Squares()}
def once(): return {"train": Squares(), "val": iter([])}
def empty(): return {"train": Squares(), "val": DataLoader([])}
def no_loss(): return {"train": Squares(), "val": Squares(), "loss": 3}
def mean_metric(): return {"train": Squares(), "val": Squares(), "metric": lambda output, target: output.mean()}
def dicts(): return {"train": Squares(), "val": DataLoader([{"x": 1.0}] * 3)}
"""


@pytest.fixture
def factory(tmp_path: Path) -> Callable[[str], str]:
    file = tmp_path / "own_data.py"
    file.write_text(FACTORY)
    return lambda name: f"{file}:{name}"


def test_factory_with_keyword_arguments_and_ready_batches(factory):
    data = load(factory("plain"), kwargs={"scale": 2.0}, batch_size=3)
    inputs, targets = zip(*data.train.epoch(0), strict=True)
    assert torch.cat(inputs).flatten().sort().values.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert [len(target) for target in targets] == [3, 3]
    assert [len(inputs) for inputs, _ in data.val.epoch(0)] == [4, 2]
    assert data.val.samples == 6


def test_factory_with_its_own_loss_and_metric(factory):
    data = load(factory("own"), batch_size=4)
    (inputs, targets), _ = data.val.epoch(0)
    assert inputs.tolist() == [[0.0], [1.0], [4.0], [9.0]]
    assert data.loss(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0])).item() == 0.25
    assert data.metric(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0])).tolist() == [0.5, 1.0]
    assert data.note.endswith("its own loss and metric")
    assert (data.own_loss, load(factory("plain")).own_loss) == (True, False)
    assert targets.tolist() == [0, 1, 0, 1]


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned a NoneType; train and val missing"),
        ("raises", "failed: RuntimeError: the disk is away"),
        ("lacking", "returned a mapping with train; val missing"),
        (
            "once",
            "val of .* is a list_iterator; give a data set, or batches that can be run through again",
        ),
        ("empty", "val of .* holds no samples"),
        ("no_loss", "a loss that is no function"),
        ("absent", "absent"),
    ],
)
def test_faulty_factories(name, message, factory):
    with pytest.raises(UsageError, match=message):
        load(factory(name))


def test_faults_that_show_while_a_factorys_data_are_read(factory):
    with pytest.raises(
        DataError, match="Sample 4 of the data cannot be read: ValueError: no square of four"
    ):
        list(load(factory("damaged"), workers=2).val.epoch(0))
    with pytest.raises(DataError, match="a dict"):
        list(load(factory("dicts")).val.epoch(0))
    with pytest.raises(DataError, match=r"returned shape \[\]; 2 scores are needed"):
        load(factory("mean_metric")).metric(torch.zeros(2), torch.zeros(2))


def test_samples_of_unequal_shape_are_one_fault():
    ragged = [(torch.zeros(index + 1), 0) for index in range(4)]
    with pytest.raises(DataError, match="do not fit together"):
        list(LoadedBatches(ragged, BatchOrder(4, 4), CPU, seed=0, workers=0).epoch(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "holds y_train, x_test, y_test; x_train/y_train or"),
        (
            {"y_train": np.arange(29)},
            r"x_train is uint8 \[30, 6, 5, 3\] but y_train holds 29 labels",
        ),
        ({"y_train": np.zeros(30)}, r"y_train is float64 \[30\]; whole numbers \[N\] are expected"),
        (
            {"y_train": np.zeros((30, 4), int)},
            r"y_train is int64 \[30, 4\]; whole numbers \[N\] are expected",
        ),
        ({"y_train": np.zeros(30, int)}, "y_train holds a single class"),
        ({"y_train": np.arange(30) - 1}, "y_train holds the label -1; labels count from 0"),
        ({"y_test": np.arange(7)}, "y_test holds the label 6, y_train none above 2"),
        ({"x_train": pixels(0, 6, 5, 3), "y_train": np.zeros(0, int)}, "x_train holds no images"),
        (
            {"x_train": pixels(30, 3, 6, 5)},
            r"x_train is uint8 \[30, 3, 6, 5\]; expected are uint8 images",
        ),
        (
            {"x_train": np.zeros((30, 6, 5, 3), int)},
            r"x_train is int64 .* expected are uint8 images",
        ),
        ({"x_train": np.full((30, 3, 6, 5), np.nan)}, "x_train holds values that are not finite"),
        (
            {"x_train": np.array([{}] * 30, dtype=object)},
            "cannot be read as a .npz without pickled objects",
        ),
        ({"x_test": pixels(7, 8, 8, 3)}, "is 8x8 where others are 5x6"),
    ],
)
def test_faulty_npz(change, message, tmp_path):
    path = write_npz(tmp_path / "a.npz", **change)
    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize("kept", [0, 10, 400, -30])
def test_truncated_npz(kept, tmp_path):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a.npz cannot be read as a .npz"):
        load(path)


def test_damaged_and_mistaken_npz(tmp_path):
    compressed = io.BytesIO()
    np.savez_compressed(
        compressed, x_train=np.zeros((30, 6, 5, 3), np.uint8), y_train=np.arange(30)
    )
    broken = bytearray(compressed.getvalue())
    broken[60:90] = bytes(30)
    (tmp_path / "broken.npz").write_bytes(broken)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("broken.npz", "array.npz"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a .npz"):
            load(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "absent.npz")


def _remove_val(root: Path) -> None:
    (root / "val").rename(root / "valid")


def _empty_class(root: Path) -> None:
    for file in (root / "train" / "bee").iterdir():
        file.unlink()


def _one_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "bee").rename(root / f"{split}_bee")


def _no_classes(root: Path) -> None:
    _one_class(root)
    (root / "train" / "ant").rename(root / "ant")


def _other_class(root: Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "wasp")


def _not_an_image(root: Path) -> None:
    (root / "train" / "bee" / "1.png").write_bytes(b"this is no image")


def _truncated_image(root: Path) -> None:
    file = root / "val" / "bee" / "2.png"
    file.write_bytes(file.read_bytes()[:70])


def _deep_colours(root: Path) -> None:
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(root / "train" / "bee" / "1.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_val, r"holds train, valid; it must hold train/ and val/ \(or test/\)"),
        (_empty_class, "train holds no images of bee"),
        (_one_class, "holds a single class, ant"),
        (_no_classes, "train holds no class folders"),
        (_other_class, "differ in their classes: bee, wasp only in one of them"),
        (_not_an_image, r"bee/1.png cannot be read"),
        (_truncated_image, r"bee/2.png cannot be read"),
        (_deep_colours, r"bee/1.png is of mode I;16"),
    ],
)
def test_faulty_folders(damage, message, tmp_path):
    damage(write_folder(tmp_path))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_unreadable_image_is_named_when_first_met_in_training(tmp_path):
    write_folder(tmp_path, size=(150, 140), each=40)
    data = load(tmp_path, workers=2, batch_size=80)
    _not_an_image(tmp_path)
    with pytest.raises(DataError, match=r"^\S*bee/1.png cannot be read"):
        list(data.train.epoch(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 5, "resize": 4}, "data.crop=5 is larger than data.resize=4"),
        ({"crop": 9}, "0.png is 6x5, less than data.crop=9; set data.resize"),
        ({"mean": [0.5], "std": [0.5]}, "is in colour .3 channels., but data.mean has 1 values"),
    ],
)
def test_settings_that_do_not_fit_the_images(fields, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(write_folder(tmp_path), **fields)


def test_a_colour_image_among_grey_ones_is_named(tmp_path):
    write_folder(tmp_path, mode="L", each=60)
    Image.fromarray(pixels(5, 6, 3)).save(tmp_path / "train" / "ant" / "1.png")
    with pytest.raises(DataError, match=r"in colour"):
        load(tmp_path, mean=[0.5], std=[0.5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/absent", "do not exist; give a folder"),
        (
            "CIFAR10:{}",
            r"does not hold torchvision's CIFAR10 .*datasets.CIFAR10\('.*', train=True, download=True\)",
        ),
        (
            "SVHN:{}",
            r"fetch it with torchvision.datasets.SVHN\('.*', split='train', download=True\)",
        ),
        ("ImageNet:{}", "does not hold torchvision's ImageNet"),
        ("CIFAR11:{}", "torchvision has no data set CIFAR11; did you mean CIFAR10"),
        ("ImageFolder:{}", "is not split into training and evaluation"),
        ("no_such_module:factory", "no_such_module"),
    ],
)
def test_sources_that_cannot_be_found(source, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load(source.format(tmp_path))


def test_unknown_keyword_arguments_of_torchvision(tmp_path):
    with pytest.raises(UsageError, match="cannot be opened with"):
        load(f"CIFAR10:{tmp_path}", kwargs={"colour": True})


def test_no_source():
    with pytest.raises(UsageError, match="No data are named"):
        load_data(DataSection(), seed=0, device=CPU)


# ----------------------------------------------------------------------------------------------------------- judging


def test_default_loss_and_metric():
    loss, metric = classification(3, exact=True)
    output, target = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
    expected = -np.mean(
        [2 - np.log(np.exp([2.0, 0, 1]).sum()), 1 - np.log(np.exp([0.0, 1, 3]).sum())]
    )
    assert loss(output, target).item() == pytest.approx(expected, rel=1e-6)
    assert metric(output, target).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("count", "exact", "output", "target", "message"),
    [
        (
            10,
            True,
            torch.zeros(2, 1000),
            torch.zeros(2).long(),
            "gives 1000 scores but the data have 10 classes",
        ),
        (
            10,
            False,
            torch.zeros(2, 9),
            torch.zeros(2).long(),
            "gives 9 scores but the data have 10 classes",
        ),
        (
            None,
            False,
            torch.zeros(2, 9),
            torch.tensor([0, 9]),
            "A label lies beyond the model's 9 scores",
        ),
        (
            None,
            False,
            torch.zeros(2, 9, 4),
            torch.zeros(2).long(),
            r"of shape \[2, 9, 4\], not scores",
        ),
        (None, False, (torch.zeros(2, 9),), torch.zeros(2).long(), "a tuple, not scores"),
        (None, False, torch.zeros(2, 9), torch.zeros(2), "not whole numbers"),
    ],
)
def test_outputs_that_do_not_fit_the_data(count, exact, output, target, message):
    loss, _ = classification(count, exact=exact)
    with pytest.raises(DataError, match=message):
        loss(output, target)


def test_more_scores_than_labels_are_allowed_where_class_names_are_unknown():
    loss, _ = classification(10, exact=False)
    assert loss(torch.zeros(2, 1000), torch.zeros(2).long()).item() == pytest.approx(
        np.log(1000), rel=1e-6
    )


# -------------------------------------------------------------------------------------------------------- quickstart


def test_quickstart_model_reads_its_test_images():
    from ddqcli.recipe.factory import import_factory

    model = import_factory(f"{QUICKSTART / 'model.py'}:digits_net")()
    model.load_state_dict(torch.load(QUICKSTART / "model.pt", weights_only=True))
    data = load(QUICKSTART / "digits.npz", mean=[0.305], std=[0.376])
    with torch.no_grad():
        hits = sum(
            data.metric(model.eval()(inputs), targets).sum().item()
            for inputs, targets in data.val.epoch(0)
        )
    assert (hits, data.val.samples) == (357, 359)


@pytest.mark.parametrize("trained_with", ["black", "mean"])
def test_padding_is_found_again_in_the_batch_norm_of_a_model(tmp_path, trained_with):
    images, labels = pixels(256, 12, 12, 3) // 2 + 100, np.arange(256)
    path = write_npz(
        tmp_path / "a.npz", x_train=images, x_test=images, y_train=labels, y_test=labels
    )
    norms = [torch.nn.BatchNorm2d(8, momentum=None) for _ in range(2)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norms[0], torch.nn.ReLU(), norms[1])
    for inputs, _ in load(path, pad=3, fill=trained_with, batch_size=64).train.epoch(1):
        model.train()(inputs)
    data = load(path, pad=3, batch_size=64)
    before = next(iter(data.train.epoch(0)))[0]
    assert detect_padding_fill(model.eval(), data) == trained_with
    assert torch.equal(next(iter(data.train.epoch(0)))[0], before)
    assert (
        detect_padding_fill(model, load(path, pad=0))
        is detect_padding_fill(torch.nn.Flatten(), data)
        is None
    )


@pytest.mark.parametrize(
    ("axis", "reads"), [(0, True), (1, False)], ids=["above or below", "left or right"]
)
def test_whether_a_model_reads_mirrored_images_is_asked_of_training_images(tmp_path, axis, reads):
    """Images with one bright half, and a network that says which half it is."""
    labels = np.arange(64) % 2
    images = np.zeros((64, 6, 6, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        np.moveaxis(image, axis, 0)[3 * label :][:3] = 200
    path = write_npz(
        tmp_path / "a.npz", x_train=images, x_test=images[:7], y_train=labels, y_test=labels[:7]
    )
    halves = torch.nn.AvgPool2d((3, 6) if axis == 0 else (6, 3))
    data = load(path, pad=0, mean=[0.5], std=[0.5])
    model = torch.nn.Sequential(halves, torch.nn.Flatten())
    assert is_flip_invariant(model, data) == is_flip_invariant(model, data, labels=False) == reads
    swapped = write_npz(
        tmp_path / "b.npz", x_train=images, x_test=images[:7], y_train=1 - labels, y_test=labels[:7]
    )
    wrong = load(swapped, pad=0, mean=[0.5], std=[0.5])
    assert is_flip_invariant(model, wrong, labels=False) == reads
