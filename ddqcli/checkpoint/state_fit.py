"""Compare a state dict with a network's names and shapes, and load it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddqcli.checkpoint.state_keys import bare_name
from ddqcli.errors import CheckpointError
from ddqcli.qat.reparametrized import make_plain

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
    """Load the tensors into the model; return a note on changed names and tensors left out.

    `path` and `arch` are for messages. Raises CheckpointError if names or shapes differ.
    """
    # `ddq finetune` stores weights that the network computes (weight_norm) as plain ones.
    make_plain(model, lambda name: name in tensors)
    wanted = state_shapes(model)
    wrapped = {bare_name(name): name for name in wanted}  # of a network with compiled parts
    tensors = {wrapped.get(name, name): tensor for name, tensor in tensors.items()}
    tensors, prefix_note = align_names(tensors, wanted)
    tensors, parallel_note = _without_parallel_parts(tensors, wanted)
    groups = _tied_names(model)
    tensors, part_note = _network_part(tensors, wanted, groups, path)
    _refuse_untied(tensors, groups, path, arch)
    tensors, tied_note = _with_tied(tensors, wanted, groups)
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
    return prefix_note + parallel_note + part_note + tied_note


def _without_parallel_parts(tensors: Tensors, wanted: dict[str, Shape]) -> tuple[Tensors, str]:
    """Return the tensors under the names that they have without DataParallel around some layers.

    It puts `module` into their names, which the network may have as a name of its own.
    """

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part != "module")

    own = {bare(name): name for name in wanted}
    renamed = {own.get(bare(name), name): tensor for name, tensor in tensors.items()}
    unique = len(own) == len(wanted) and len(renamed) == len(tensors)
    if not unique or len(renamed.keys() & wanted) <= len(tensors.keys() & wanted):
        return tensors, ""
    return renamed, ", module stripped from names"


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Map each name of the model's state dict to all names of its tensor."""
    names_of: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names_of.setdefault(id(value), []).append(name)
    return {name: names for names in names_of.values() for name in names}


def _refuse_untied(tensors: Tensors, groups: dict[str, list[str]], path: Path, arch: str) -> None:
    """Raise CheckpointError for different values of a tensor that the network has only once."""
    for name in tensors:
        first = next((each for each in groups.get(name, ()) if each in tensors), name)
        one, other = tensors[first], tensors[name]
        if one.shape == other.shape and bool((one != other).any()):
            raise CheckpointError(
                f"{path} has different values for {first} and {name}, which are one tensor in "
                f"{arch}; build the network without tying them, as it was trained."
            )


def _with_tied(
    tensors: Tensors, wanted: dict[str, Shape], groups: dict[str, list[str]]
) -> tuple[Tensors, str]:
    """Add tensors that the file has under another name of the same tensor; return a note, too."""
    found = {}
    for name in wanted:
        other = next((each for each in groups.get(name, ()) if each in tensors), None)
        if name not in tensors and other is not None:
            found[name] = other
    note = f", {_few([f'{a} tied to {b}' for a, b in found.items()])}" if found else ""
    return tensors | {name: tensors[other] for name, other in found.items()}, note


def _network_part(
    tensors: Tensors, wanted: dict[str, Shape], groups: dict[str, list[str]], path: Path
) -> tuple[Tensors, str]:
    """Return the tensors of the network alone, and a note on what is left out.

    A training module holds its loss and metrics beside the network. The network's tensors are those
    under the one prefix under which all of them are there. Raises CheckpointError if they are there
    under several.
    """
    if tensors.keys() <= wanted.keys():
        return tensors, ""
    required = [name for name in wanted if not name.endswith("num_batches_tracked")]

    def holds_all(prefix: str) -> bool:
        return all(
            any(prefix + each in tensors for each in groups.get(name, [name])) for name in required
        )

    names = groups.get(required[0], required[:1]) if required else []
    prefixes = {
        each.removesuffix(name)
        for name in names
        for each in tensors
        if each == name or each.endswith(f".{name}")
    }
    fitting = sorted(prefix for prefix in prefixes if holds_all(prefix))
    if not fitting:
        return tensors, ""
    prefix = fitting[0]  # "" if the network is also there without one
    if prefix and len(fitting) > 1:
        places = " and ".join(map(repr, fitting))
        raise CheckpointError(
            f"{path} holds this network under {places}; save the state_dict() of one of them."
        )
    children = {name.partition(".")[0] for name in wanted}
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    part = {n: t for n, t in own.items() if n in wanted or n.partition(".")[0] in children}
    left_out = [
        n for n in tensors if not n.startswith(prefix) or n.removeprefix(prefix) not in part
    ]
    note = f", prefix '{prefix}' stripped" if prefix else ""
    note += f", {len(left_out)} tensors left out ({_few(left_out)})" if left_out else ""
    return part, note


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
