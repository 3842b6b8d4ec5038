"""Small images in files, for the tests of data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddqcli.data.load import Data, load_data
from ddqcli.recipe.schema import IMAGENET_MEAN, IMAGENET_STD, DataSection

CPU = torch.device("cpu")
MEAN = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)
STD = torch.tensor(IMAGENET_STD, dtype=torch.float64)
rng = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def write_npz(path: Path, **arrays: Any) -> Path:
    """Write 30 training and 7 test images 6x5 of 3 classes.

    `arrays` replace these or are added; None leaves one out.
    """
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
    """Return an image as the model's input, float64 [C, H, W]."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return (values - MEAN[:, None, None]) / STD[:, None, None]


def load(source: Path | str, seed: int = 0, **fields: Any) -> Data:
    return load_data(
        DataSection(source=str(source), **{"workers": 0, **fields}), seed=seed, device=CPU
    )


def same_batches(left: list[Any], right: list[Any]) -> bool:
    """True if two lists hold the same batches, bit for bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
