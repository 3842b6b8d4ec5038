"""Data sets of torchvision, named as DATASET:ROOT; never downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torchvision import datasets

from ddqcli.data.source import Source
from ddqcli.errors import DataError, UsageError
from ddqcli.formatting import did_you_mean


def is_torchvision(name: str, root: str) -> bool:
    """True if NAME:ROOT names a data set of torchvision.

    Raises UsageError for an unknown NAME if ROOT is a path, so that it cannot be a factory.
    """
    if name in datasets.__all__:
        return True
    if not all(part.isidentifier() for part in root.split(".")):
        hint = did_you_mean(name, datasets.__all__) or "."
        raise UsageError(f"torchvision has no data set {name}{hint}")
    return False


def open_torchvision(name: str, root: str, kwargs: dict[str, Any]) -> Source:
    """Open torchvision's data set `name`, which must already be in the folder `root`.

    Raises DataError if it is not there, UsageError if it has no splits or refuses `kwargs`, and if
    these ask for a download.
    """
    kwargs = dict(kwargs)
    if kwargs.pop("download", False):  # some classes pass it on without naming it themselves
        raise UsageError(
            "data.kwargs.download: ddq downloads nothing; fetch the data with "
            f"torchvision.datasets.{name}({root!r}, download=True) first."
        )
    dataset_class = getattr(datasets, name)
    accepted = inspect.signature(dataset_class).parameters
    if "train" in accepted:
        train = _open(dataset_class, name, root, {**kwargs, "train": True})
        val = _open(dataset_class, name, root, {**kwargs, "train": False})
        val_name = "its test part"
    elif "split" in accepted:
        train = _open(dataset_class, name, root, {**kwargs, "split": "train"})
        val_name, val = _open_val(dataset_class, name, root, kwargs)
    else:
        raise UsageError(
            f"torchvision's {name} is not split into training and evaluation; give a factory "
            "instead."
        )
    classes = _class_names(train)
    return Source(
        train=train,
        val=val,
        location=f"torchvision's {name} in {root} ({val_name} for evaluation)",
        classes=classes,
        count=len(classes) if classes else None,
    )


def _open_val(
    dataset_class: Callable[..., Any], name: str, root: str, kwargs: dict[str, Any]
) -> tuple[str, Any]:
    """Return the split `val` if the data set has one, else `test`."""
    try:
        return "val", _open(dataset_class, name, root, {**kwargs, "split": "val"})
    except UsageError:
        return "test", _open(dataset_class, name, root, {**kwargs, "split": "test"})


def _open(dataset_class: Callable[..., Any], name: str, root: str, kwargs: dict[str, Any]) -> Any:
    can_download = "download" in inspect.signature(dataset_class).parameters
    try:
        return dataset_class(root, **kwargs, **({"download": False} if can_download else {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"torchvision's {name} cannot be opened with {kwargs}: {error}") from error
    except Exception as error:
        remedy = "torchvision's page on it says where to get it"
        if can_download:
            extra = "".join(f", {key}={value!r}" for key, value in kwargs.items())
            call = f"torchvision.datasets.{name}({root!r}{extra}, download=True)"
            remedy = f"fetch it with {call}"
        raise DataError(
            f"{root} does not hold torchvision's {name} ({_first_sentence(error)}); {remedy}."
        ) from error


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    if not names:
        return None
    # ImageNet has several synonyms for a class.
    return tuple(name if isinstance(name, str) else name[0] for name in names)


def _first_sentence(error: Exception) -> str:
    text = str(error)
    return text.split(". ")[0].splitlines()[0].rstrip(".") if text else type(error).__name__
