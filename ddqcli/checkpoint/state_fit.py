"""Compare a state dict with a network's names and shapes, and load it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddqcli.errors import CheckpointError

Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StateFit:
    """The difference between a checkpoint's tensors and a network's."""

    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[Shape, Shape]]  # shape in the checkpoint, shape in the network
    common: int  # number of names in both

    @property
    def classes(self) -> int | None:
        """The checkpoint's number of classes, if it is the only difference; else None."""
        differences = {
            (have[:1], want[:1], have[1:] == want[1:]) for have, want in self.mismatched.values()
        }
        if self.missing or self.unexpected or len(differences) != 1:
            return None
        (have, _, same_inputs), *_ = differences
        return have[0] if have and same_inputs else None

    @property
    def exact(self) -> bool:
        """True if all names and shapes agree."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def matching(self) -> int:
        """Number of names that have the same shape in both."""
        return self.common - len(self.mismatched)


def state_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of the model's state dict, without lazy tensors, which have none yet."""
    state = model.state_dict().items()
    return {
        name: tuple(t.shape) for name, t in state if isinstance(t, torch.Tensor) and not is_lazy(t)
    }


def compare_state(tensors: Tensors, wanted: dict[str, Shape]) -> StateFit:
    """Compare a checkpoint's tensors with the shapes that a network wants."""
    # torch loads old checkpoints without num_batches_tracked.
    required = [name for name in wanted if not name.endswith("num_batches_tracked")]
    shapes = {
        name: (tuple(tensors[name].shape), wanted[name]) for name in required if name in tensors
    }
    return StateFit(
        missing=[name for name in required if name not in tensors],
        unexpected=[name for name in tensors if name not in wanted],
        mismatched={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        common=len(shapes),
    )


def align_names(tensors: Tensors, wanted: Collection[str]) -> tuple[Tensors, str]:
    """Strip the prefix that all tensors share, or add the one that all wanted names share.

    Returns the tensors unchanged if that does not match more names; and a note on the change, or
    an empty string.
    """
    have, want = _shared_prefix(tensors), _shared_prefix(wanted)
    renamed = {want + name.removeprefix(have): tensor for name, tensor in tensors.items()}
    if (have and want) or len(renamed.keys() & set(wanted)) <= len(tensors.keys() & set(wanted)):
        return tensors, ""
    return renamed, f", prefix '{have}' stripped" if have else f", prefix '{want}' added"


def load_state(model: nn.Module, tensors: Tensors, path: Path, arch: str) -> str:
    """Load the tensors into the model, strictly; return a note on changes to their names.

    `path` and `arch` are for messages. Raises CheckpointError if names or shapes differ.
    """
    wanted = state_shapes(model)
    tensors, prefix_note = align_names(tensors, wanted)
    state = OrderedDict(tensors)
    # torch upgrades modules without a version, e.g. adds num_batches_tracked. MNASNet refuses to
    # load a state dict that has no version for the whole.
    version = {"": {"version": getattr(model, "_version", None)}}
    state._metadata = version  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state)
    except Exception as error:
        fit = compare_state(tensors, wanted)
        reason = f": {' '.join(str(error).split())[:300]}" if fit.exact else _describe(fit)
        raise CheckpointError(f"{path} does not fit {arch}{reason}.") from error
    return prefix_note


def _shared_prefix(names: Collection[str]) -> str:
    """Return the first part of the names, such as `model.`, if all share it; else ""."""
    prefixes = {name.partition(".")[0] + "." for name in names}
    return prefixes.pop() if len(prefixes) == 1 and all("." in name for name in names) else ""


def _describe(fit: StateFit) -> str:
    mismatched = [
        f"{name} {list(have)} instead of {list(want)}"
        for name, (have, want) in fit.mismatched.items()
    ]
    faults = (
        ("it lacks", fit.missing),
        ("it has unknown", fit.unexpected),
        ("it has in another shape", mismatched),
    )
    parts = [f"{fault} {len(names)} tensors ({_few(names)})" for fault, names in faults if names]
    if fit.classes:
        remedy = f"only the classes differ: give --set model.kwargs.num_classes={fit.classes}"
    else:
        remedy = (
            "give the --arch it was trained with, built with the same keywords "
            "(--set model.kwargs.NAME=VALUE)"
        )
    return f": {', '.join(parts)}; {remedy}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
