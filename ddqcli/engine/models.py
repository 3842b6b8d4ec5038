"""Building the network of a checkpoint: by name, by a user's factory, or found among torchvision's by its shapes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import re
import sys
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torchvision import models as zoo

from ddqcli.engine.checkpoint import Checkpoint
from ddqcli.errors import CheckpointError, UsageError

Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]

_SPEC = "write it as package.module:factory or path/to/file.py:factory"
_WITH_AUX = ("googlenet", "inception_v3")
_AUX_HEADS = ("aux1.", "aux2.", "AuxLogits.")
_OLD_NAMES = (  # in files torchvision itself publishes: of DenseNet, of the vision transformer
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"mlp\.linear_1\."), "mlp.0."),
    (re.compile(r"mlp\.linear_2\."), "mlp.3."),
)
_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_)


@dataclass(frozen=True)
class Built:
    """A model with the checkpoint's weights, in float32 and eval mode."""

    model: nn.Module
    arch: str
    note: str  # e.g. "torchvision resnet18 with 10 classes, found by its keys and shapes"


def build_model(checkpoint: Checkpoint, arch: str | None, kwargs: dict[str, Any]) -> Built:
    """The checkpoint's network.

    `arch` is a torchvision classification network or a factory's spec, built with `kwargs`. Without it the network is
    the checkpoint's own pickled module, or else the torchvision network of the same keys and shapes; what shapes do
    not show (strides, activations) is then torchvision's. Raises UsageError where no network can be built and
    CheckpointError where the weights do not fit it.
    """
    if arch is None and (stray := sorted(kwargs.keys() - {"num_classes"})):
        raise UsageError(f"Keywords are given ({', '.join(stray)}) but not for which network; name it with --arch.")
    if arch is None and checkpoint.module is not None:
        name = type(checkpoint.module).__name__
        return Built(checkpoint.module.float().eval(), name, f"{name}, the module pickled in the checkpoint")
    if arch is not None and ":" in arch:
        model = _call(import_factory(arch), arch, kwargs)
        renamed = _load(model, checkpoint.tensors, checkpoint.path, arch)
        return Built(model.float().eval(), arch, arch + renamed)
    return _build_torchvision(checkpoint, arch, kwargs)


# ---- factories


def import_factory(spec: str) -> Callable[..., Any]:
    """The function 'package.module:factory' or 'path/to/file.py:factory' names. Raises UsageError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{spec!r} names no function; {_SPEC}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if callable(factory):
        return factory
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    own = [key for key in public if getattr(vars(module)[key], "__module__", None) == module.__name__] or public
    near = difflib.get_close_matches(name, own, n=8, cutoff=0.0)
    state = "is no function" if hasattr(module, name) else "is not there"
    raise UsageError(f"{name} {state} in {place}; {'it has ' + ', '.join(near) if near else 'it has no functions'}.")


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{name!r} is neither a Python module nor a .py file; {_SPEC}.")
    with _explained(name), _first_on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UsageError(f"There is no module {error.name}; install it or name a file, nets.py:factory.") from error


def _import_file(path: Path) -> ModuleType:
    """The file as a module, made once. It keeps the file's name, so that worker processes can import it too."""
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{zlib.crc32(bytes(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # nor is its loader, for a .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _explained(str(path)), _first_on_path(path.parent):
            spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Let imports find modules in `folder` first, as when a file in it is run; afterwards they find them last."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever a user's code raises, an exit included, as one UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"{what} raised {type(error).__name__}{': ' + said if said else ''}") from error


def _call(factory: Callable[..., Any], what: str, kwargs: dict[str, Any]) -> nn.Module:
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    with _explained(f"{what} called with ({given})"):
        model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{what} returned {type(model).__name__} where a torch.nn.Module is expected.")
    return model


# ---- weights into a network


@dataclass(frozen=True)
class _Fit:
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


def _shapes(model: nn.Module) -> dict[str, Shape]:
    state = model.state_dict().items()
    return {name: tuple(t.shape) for name, t in state if isinstance(t, torch.Tensor) and not is_lazy(t)}


def _compare(tensors: Tensors, wanted: dict[str, Shape]) -> _Fit:
    needed = [name for name in wanted if not name.endswith("num_batches_tracked")]  # torch does without
    missing = [name for name in needed if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    pairs = {name: (tuple(tensors[name].shape), wanted[name]) for name in needed if name in tensors}
    return _Fit(missing, unexpected, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}, len(pairs))


def _aligned(tensors: Tensors, wanted: Collection[str]) -> tuple[Tensors, str]:
    """The tensors without the prefix all of them carry, or with the one all of `wanted` carry, if that fits better."""
    have, want = _first_name(tensors), _first_name(wanted)
    renamed = {want + name.removeprefix(have): tensor for name, tensor in tensors.items()}
    if (have and want) or len(renamed.keys() & set(wanted)) <= len(tensors.keys() & set(wanted)):
        return tensors, ""
    return renamed, f", prefix '{have}' stripped" if have else f", prefix '{want}' added"


def _first_name(names: Collection[str]) -> str:
    firsts = {name.partition(".")[0] + "." for name in names}
    return firsts.pop() if len(firsts) == 1 and all("." in name for name in names) else ""


def _load(model: nn.Module, tensors: Tensors, path: Path, arch: str) -> str:
    """Copy the tensors into the model, strictly; says what was done to their names. Raises CheckpointError."""
    wanted = _shapes(model)
    tensors, renamed = _aligned(tensors, wanted)
    state = OrderedDict(tensors)
    # Parts that state no version are upgraded by torch (num_batches_tracked is added); MNASNet wants one for the whole.
    state._metadata = {"": {"version": getattr(model, "_version", None)}}  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state)
    except Exception as error:
        fit = _compare(tensors, wanted)
        reason = f": {' '.join(str(error).split())[:300]}" if fit.exact else _misfit(fit)
        raise CheckpointError(f"{path} does not fit {arch}{reason}.") from error
    return renamed


def _misfit(fit: _Fit) -> str:
    reshaped = [f"{name} {list(have)} instead of {list(want)}" for name, (have, want) in fit.reshaped.items()]
    faults = (("it lacks", fit.missing), ("it has unknown", fit.unexpected), ("it has in another shape", reshaped))
    parts = [f"{what} {len(names)} tensors ({_few(names)})" for what, names in faults if names]
    if fit.classes:
        remedy = f"only the classes differ: give --set model.kwargs.num_classes={fit.classes}"
    else:
        remedy = "give the --arch it was trained with, built with the same keywords (--set model.kwargs.NAME=VALUE)"
    return f": {', '.join(parts)}; {remedy}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


# ---- torchvision


def _build_torchvision(checkpoint: Checkpoint, name: str | None, kwargs: dict[str, Any]) -> Built:
    if name is not None and name not in _names():
        near = difflib.get_close_matches(name, _names(), n=3, cutoff=0.75)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(f"torchvision has no classification network {name!r}{hint}; one of your own, {_SPEC}.")
    tensors = _current(checkpoint.tensors, keep_aux=bool(kwargs.get("aux_logits")))
    if name is None:
        found = ", found by its keys and shapes"
        name, kwargs = _discover(checkpoint.path, tensors, kwargs)
    else:
        found = ""
        kwargs, _ = _propose(name, tensors, kwargs)
    model = _torchvision(name, kwargs)
    renamed = _load(model, tensors, checkpoint.path, name)
    note = f"torchvision {name} with {kwargs.get('num_classes', 1000)} classes{found}{renamed}"
    note += ", auxiliary heads left out" if len(tensors) < len(checkpoint.tensors) else ""
    if name in _WITH_AUX and "transform_input" not in kwargs:
        note += f" (torchvision's published weights need --arch {name} --set model.kwargs.transform_input=true)"
    return Built(model.float().eval(), name, note)


def _names() -> list[str]:
    return list(zoo.list_models(module=zoo))


def _current(tensors: Tensors, keep_aux: bool) -> Tensors:
    """The tensors under the names torchvision uses today, without the heads that only training from scratch uses."""
    kept = {name: t for name, t in tensors.items() if keep_aux or not name.startswith(_AUX_HEADS)}
    for old, new in _OLD_NAMES:
        kept = {old.sub(new, name): t for name, t in kept.items()}
    return kept


def _torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _call(partial(zoo.get_model, name, weights=None), name, kwargs)


def _propose(name: str, tensors: Tensors, kwargs: dict[str, Any]) -> tuple[dict[str, Any], _Fit]:
    """`kwargs` and what the tensors say about the others, and how they fit the network so built."""
    kwargs = {**_visible(name, tensors), **kwargs}
    with _Blank():
        wanted = _shapes(_torchvision(name, kwargs))
    fit = _compare(_aligned(tensors, wanted)[0], wanted)
    if fit.classes and "num_classes" not in kwargs:
        return {**kwargs, "num_classes": fit.classes}, replace(fit, reshaped={})
    return kwargs, fit


def _visible(name: str, tensors: Tensors) -> dict[str, Any]:
    """Keywords other than num_classes that can be told from the tensors."""
    if name in _WITH_AUX:
        return {"aux_logits": False, "init_weights": False}
    positions = tensors.get("encoder.pos_embedding")
    if name.startswith("vit_") and positions is not None and positions.ndim == 3 and positions.shape[1] > 1:
        patch = int(name.rpartition("_")[2])  # pixels: 16 in vit_b_16
        return {"image_size": math.isqrt(positions.shape[1] - 1) * patch}
    return {}


class _Blank(TorchFunctionMode):
    """Within it, layers are built without memory or initial values, so that a network's shapes cost milliseconds.

    Unlike torch.device("meta") it leaves alone what constructors compute with, such as RegNet's widths.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def _discover(path: Path, tensors: Tensors, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The torchvision network of exactly these keys and shapes, and its keywords. Raises UsageError.

    Looks through one family: that whose first member has most names in common. No two networks have the same shapes (a
    test sees to it), so the first that fits is the one.
    """
    families: dict[str, list[str]] = {}
    for name in _names():
        families.setdefault(zoo.get_model_builder(name).__module__, []).append(name)
    likely = max(families.values(), key=lambda names: _propose(names[0], tensors, kwargs)[1].common)
    fits = {}
    for name in likely:
        proposed, fit = _propose(name, tensors, kwargs)
        if fit.exact:
            return name, proposed
        fits[name] = fit
    name, fit = max(fits.items(), key=lambda item: (item[1].same, -len(item[1].missing)))
    raise UsageError(
        f"{path} is no classification network of torchvision: the closest, {name}, has {fit.common + len(fit.missing)} "
        f"tensors, of which it has {fit.common}, {fit.same} in the same shape; say how to build it with --arch NAME or "
        "--arch path/to/file.py:factory."
    )
