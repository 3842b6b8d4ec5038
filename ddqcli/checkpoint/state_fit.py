"""How a state dict compares with a network, and loading it."""

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


# ---- weights into a network


@dataclass(frozen=True)
class StateFit:
    """How a checkpoint's tensors compare with a network's."""

    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[Shape, Shape]]  # in the checkpoint, in the network
    common: int  # names in both

    @property
    def classes(self) -> int | None:
        """The checkpoint's number of classes, if that is all they differ in."""
        ends = {(have[:1], want[:1], have[1:] == want[1:]) for have, want in self.reshaped.values()}
        if self.missing or self.unexpected or len(ends) != 1:
            return None
        (have, _, same_inputs), *_ = ends
        return have[0] if have and same_inputs else None

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def same(self) -> int:
        return self.common - len(self.reshaped)


def state_shapes(model: nn.Module) -> dict[str, Shape]:
    state = model.state_dict().items()
    return {
        name: tuple(t.shape) for name, t in state if isinstance(t, torch.Tensor) and not is_lazy(t)
    }


def compare_state(tensors: Tensors, wanted: dict[str, Shape]) -> StateFit:
    needed = [
        name for name in wanted if not name.endswith("num_batches_tracked")
    ]  # torch does without
    missing = [name for name in needed if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    pairs = {name: (tuple(tensors[name].shape), wanted[name]) for name in needed if name in tensors}
    return StateFit(
        missing,
        unexpected,
        {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        len(pairs),
    )


def align_names(tensors: Tensors, wanted: Collection[str]) -> tuple[Tensors, str]:
    """The tensors without the prefix all of them carry, or with the one all of `wanted` carry, if that fits better."""
    have, want = _first_name(tensors), _first_name(wanted)
    renamed = {want + name.removeprefix(have): tensor for name, tensor in tensors.items()}
    if (have and want) or len(renamed.keys() & set(wanted)) <= len(tensors.keys() & set(wanted)):
        return tensors, ""
    return renamed, f", prefix '{have}' stripped" if have else f", prefix '{want}' added"


def _first_name(names: Collection[str]) -> str:
    firsts = {name.partition(".")[0] + "." for name in names}
    return firsts.pop() if len(firsts) == 1 and all("." in name for name in names) else ""


def load_state(model: nn.Module, tensors: Tensors, path: Path, arch: str) -> str:
    """Copy the tensors into the model, strictly; says what was done to their names. Raises CheckpointError."""
    wanted = state_shapes(model)
    tensors, renamed = align_names(tensors, wanted)
    state = OrderedDict(tensors)
    # Parts that state no version are upgraded by torch (num_batches_tracked is added); MNASNet wants one for the whole.
    state._metadata = {"": {"version": getattr(model, "_version", None)}}  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state)
    except Exception as error:
        fit = compare_state(tensors, wanted)
        reason = f": {' '.join(str(error).split())[:300]}" if fit.exact else _misfit(fit)
        raise CheckpointError(f"{path} does not fit {arch}{reason}.") from error
    return renamed


def _misfit(fit: StateFit) -> str:
    reshaped = [
        f"{name} {list(have)} instead of {list(want)}"
        for name, (have, want) in fit.reshaped.items()
    ]
    faults = (
        ("it lacks", fit.missing),
        ("it has unknown", fit.unexpected),
        ("it has in another shape", reshaped),
    )
    parts = [f"{what} {len(names)} tensors ({_few(names)})" for what, names in faults if names]
    if fit.classes:
        remedy = f"only the classes differ: give --set model.kwargs.num_classes={fit.classes}"
    else:
        remedy = "give the --arch it was trained with, built with the same keywords (--set model.kwargs.NAME=VALUE)"
    return f": {', '.join(parts)}; {remedy}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
