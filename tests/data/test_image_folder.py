"""Folders of images are opened, and their faults named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import load, reference, write_folder
from PIL import Image

from ddqcli.data.image_folder import open_folder
from ddqcli.errors import DataError


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
        f"6 train and 6 evaluation images of 2 classes from {tmp_path} (val/ for evaluation), 6x5, "
        "kept in memory; mean 0.485 0.456 0.406, std 0.229 0.224 0.225; training with crops after "
        "padding by 4 and flips"
    )


def test_folder_with_test_instead_of_val(tmp_path):
    assert "(test/ for evaluation)" in load(write_folder(tmp_path, "test")).note


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


def _sixteen_bit_image(root: Path) -> None:
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
        (_sixteen_bit_image, r"bee/1.png is of mode I;16"),
    ],
)
def test_faulty_folders(damage, message, tmp_path):
    damage(write_folder(tmp_path))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_unreadable_image_is_named_when_training_reads_it(tmp_path):
    write_folder(tmp_path, size=(150, 140), each=40)
    data = load(tmp_path, workers=2, batch_size=80)
    _not_an_image(tmp_path)
    with pytest.raises(DataError, match=r"^\S*bee/1.png cannot be read"):
        list(data.train.epoch(0))


def test_hidden_files_and_folders_are_no_data(tmp_path):
    root = write_folder(tmp_path / "data")
    expected = open_folder(root)
    for split in ("train", "val"):
        (root / split / ".ipynb_checkpoints").mkdir()
    first = next((root / "train").glob("*/*.png"))
    (first.parent / f"._{first.name}").write_bytes(b"what macOS leaves")
    (first.parent / ".ipynb_checkpoints").mkdir()
    (first.parent / ".ipynb_checkpoints" / "copy.png").write_bytes(first.read_bytes())
    found = open_folder(root)
    assert found.classes == expected.classes
    assert found.train.samples == expected.train.samples
    assert found.val.samples == expected.val.samples


def test_a_link_in_a_circle_adds_no_images_and_another_folder_does(tmp_path):
    root = write_folder(tmp_path / "data")
    expected = len(open_folder(root).train)
    folder = next((root / "train").iterdir())
    for place in (tmp_path, root, root / "train", folder):
        (folder / "loop").symlink_to(place)
        assert len(open_folder(root).train) == expected
        (folder / "loop").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in folder.glob("*.png"):
        (elsewhere / f"more-{path.name}").write_bytes(path.read_bytes())
    (folder / "linked").symlink_to(elsewhere)
    assert len(open_folder(root).train) == expected + len(list(elsewhere.iterdir()))


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    """Orientation 6 of EXIF: the camera was turned by a quarter."""
    root = write_folder(tmp_path / "data")
    path = next((root / "train").glob("*/*.png"))
    pixels = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    train = open_folder(root).train
    index = [name for name, _ in train.samples].index(str(path))
    assert np.array_equal(np.asarray(train[index][0]), np.rot90(pixels, -1))
