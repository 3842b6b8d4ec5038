"""A small user's project, and `ddq` as a function in this process or in a fork."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typer.testing import CliRunner

NET = """
from torch import nn

def build(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )
"""

RECIPE = """
name: tiny
model: {checkpoint: model.pt, arch: "net.py:build"}
data: {source: images.npz, mean: [0.5], std: [0.5], pad: 1, flip: auto, batch_size: 16, workers: 0}
activations: {bits: 8}
budget: {target_bits: 4}
train:
  {epochs: 3, optimizer: sgd, lr: 0.01, batch_norm: batch, bn_batches: 2, save_every: 3,
   device: cpu}
"""
STEPS = 12  # 10 of 80 training images are held out, so an epoch has 4 batches


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def data(self) -> dict[str, Any]:
        return self.envelope["data"]


def ddq(*args: object) -> Answer:
    """Run `ddq ARGS` in this process."""
    from ddqcli.cli.app import app

    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return Answer(result.exit_code, result.stdout, result.stderr)


def in_child(*commands: str, before: Callable[[], object] = lambda: None) -> int:
    """Fork a process that calls `before` and runs `ddq` with each line of arguments; return its id.

    It runs on one thread, exits with the largest exit code and writes stderr to child.txt.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        torch.set_num_threads(1)
        before()
        answers = [ddq(*shlex.split(command)) for command in commands]
        code = max(answer.code for answer in answers)
        Path("child.txt").write_text("".join(answer.err for answer in answers))
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_project(folder: Path) -> Path:
    """Write a network, its state dict, data of four classes and a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "ddq.yaml").write_text(RECIPE)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    torch.manual_seed(0)
    model, train = scope["build"](), images(80, "x_train", "y_train")
    for module in model:
        module.momentum = 1.0  # BatchNorm then knows these images
    with torch.no_grad():
        model((torch.from_numpy(train["x_train"])[:, None] / 255 - 0.5) / 0.5)
    torch.save(model.state_dict(), folder / "model.pt")
    np.savez(folder / "images.npz", **train, **images(32, "x_test", "y_test"))
    return folder


def images(count: int, *names: str) -> dict[str, np.ndarray]:
    """Return images of noise with one bright quarter, and its number 0 to 3 as the label."""
    random = np.random.default_rng(count)
    labels = np.arange(count) % 4
    x = random.integers(0, 90, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(x, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
    return dict(zip(names, (x, labels), strict=True))


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Make `folder` the working folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def folder_of_images(folder: Path) -> None:
    """Write such images as PNG files into train/ and test/, one folder per class."""
    from PIL import Image

    for split, count in (("train", 32), ("test", 8)):
        arrays = images(count, "x", "y")
        for number, (image, label) in enumerate(zip(arrays["x"], arrays["y"], strict=True)):
            path = folder / split / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
