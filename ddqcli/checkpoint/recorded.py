"""Rebuild the float network that an exported file names, without code that comes with the file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import Checkpoint
from ddqcli.checkpoint.torchvision_models import classifier_names
from ddqcli.errors import UsageError

_TIMM = "timm:"


def build_recorded(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> nn.Module:
    """Return the network of torchvision or timm that a file's meta names, with these weights.

    A file may come from anyone, so it chooses among installed networks and sets numbers; no other
    argument of it, such as a path or an address, reaches their constructors.

    Raises UsageError for any other network, and CheckpointError if the weights do not fit.
    """
    remedy = f'pass the float network: ddqcli.load("{path.name}", net).'
    try:
        arch = meta["report"]["source"]["arch"]
        kwargs = dict(meta["recipe"].get("model", {}).get("kwargs", {}))
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UsageError(f"{path} does not say how its network is built; {remedy}") from None
    if not isinstance(arch, str) or not (arch in classifier_names() or _is_of_timm(arch, path)):
        raise UsageError(
            f"{path} was made from {arch}, which is no network of torchvision or timm; {remedy}"
        )
    if unsafe := [name for name, value in kwargs.items() if not isinstance(value, (int, float))]:
        raise UsageError(
            f"{path} was made with {unsafe[0]}={kwargs[unsafe[0]]!r}, and load takes only numbers "
            f"from a file; {remedy}"
        )
    return build_model(Checkpoint(path, "", dict(tensors), ""), arch, kwargs).model


def _is_of_timm(arch: str, path: Path) -> bool:
    """True for a name in timm's registry. Raises UsageError if timm is needed and missing."""
    if not arch.startswith(_TIMM):
        return False
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"{path} was made from {arch}; run pip install timm.")
    timm = importlib.import_module("timm")
    return bool(timm.is_model(arch.removeprefix(_TIMM)))
