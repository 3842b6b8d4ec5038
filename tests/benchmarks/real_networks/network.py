"""The description of one network, its loading from a package, and common agreement metrics."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CALIBRATION = 192  # training samples
TEST = 480  # held-out samples

# (output, float output) -> one value per sample, [B]
Comparison = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """One pretrained network with a single output tensor; several outputs are concatenated."""

    task: str
    metric: str  # the condition under which a sample agrees with the float network
    packages: tuple[str, ...]  # requirements: the network, its weights, its sources of samples
    build: Callable[[Path], nn.Module]  # from the folder of installed packages, with weights
    samples: Callable[[Path], tuple[Tensor, Tensor]]  # calibration and test samples, as stored
    agreement: Comparison
    loss: Comparison | None = None  # None for a classifier, which trains with ddq's own loss
    preprocess: Callable[[Tensor], Tensor] = torch.Tensor.float  # stored samples to inputs
    copied: tuple[str, ...] = ()  # folders that `prepare` copies next to the packages
    slow: bool = False  # runs only if named


def import_module(
    site: Path,
    name: str,
    *,
    whole: Sequence[str] = (),
    absent: Sequence[str] = (),
    values: Mapping[str, Any] = MappingProxyType({}),
) -> ModuleType:
    """Import one module of an installed package without running the `__init__` of its parents.

    This avoids the package's dependencies, which `prepare` does not install.

    Args:
        whole: parent packages to import normally.
        absent: imports that the network does not need, replaced by empty modules.
        values: names that the module expects in its top-level package.
    """
    parents = name.split(".")[:-1]
    for count in range(1, len(parents) + 1):
        package = ".".join(parents[:count])
        if package not in sys.modules and package not in whole:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(site.joinpath(*parents[:count]))]
    for other in absent:
        sys.modules.setdefault(other, ModuleType(other))
    vars(sys.modules[parents[0]]).update(values)
    return importlib.import_module(name)


def load_state(file: Path) -> dict[str, Tensor]:
    """Load a state dict, without the prefix that nn.DataParallel adds."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): value for name, value in state.items()}


def same_class(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if the highest score is the same."""
    return (output.argmax(1) == expected.argmax(1)).float()


def same_signs(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if all binary decisions of a sample are the same."""
    return ((output > 0) == (expected > 0)).flatten(1).all(1).float()


def squared_error(output: Tensor, expected: Tensor) -> Tensor:
    """Return the mean squared difference of each sample."""
    return (output - expected).square().flatten(1).mean(1)


def binary_divergence(output: Tensor, expected: Tensor) -> Tensor:
    """Return the binary cross-entropy of probabilities minus its minimum."""
    output, expected = output.clamp(1e-6, 1 - 1e-6), expected.clamp(1e-6, 1 - 1e-6)
    loss = F.binary_cross_entropy(output, expected, reduction="none")
    minimum = F.binary_cross_entropy(expected, expected, reduction="none")
    return (loss - minimum).flatten(1).mean(1)


def logit_divergence(output: Tensor, expected: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits minus its minimum."""
    return binary_divergence(output.sigmoid(), expected.sigmoid())


def divergence(output: Tensor, expected: Tensor) -> Tensor:
    """Return the KL divergence over the last dimension, averaged over the others."""
    target, prediction = expected.log_softmax(-1), output.log_softmax(-1)
    kl = F.kl_div(prediction, target, log_target=True, reduction="none")
    return kl.sum(-1).flatten(1).mean(1)
