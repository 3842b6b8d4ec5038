"""`ddq init`: a recipe for the model and data at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import TensorDataset

from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.checkpoint.tensors import is_artifact
from ddqcli.data.image_format import sample_sizes
from ddqcli.data.load import open_source
from ddqcli.data.source import list_names
from ddqcli.errors import DDQError, UsageError
from ddqcli.formatting import count
from ddqcli.recipe.assignments import assign
from ddqcli.recipe.file import RECIPE_NAME
from ddqcli.recipe.missing_file import CHECKPOINTS
from ddqcli.recipe.paths import move_paths
from ddqcli.recipe.schema import DataSection, Recipe
from ddqcli.recipe.template import commented_recipe
from ddqcli.runs.files import check_output, write_atomic

_TARGET_BITS = 4
_GRAY = [0.5]  # of mean and std
T = TypeVar("T")


@dataclass(frozen=True)
class ModelFacts:
    """The network found."""

    checkpoint: str
    arch: str | None
    parameters: int
    bytes: int  # of all tensors in the checkpoint

    def __str__(self) -> str:
        arch = self.arch or "not recognized: give --arch"
        return f"{self.checkpoint} ({arch}): {count(self.parameters)} values, {self.bytes:,} bytes"


@dataclass(frozen=True)
class DataFacts:
    """The data found."""

    source: str
    train: int  # images
    val: int
    classes: int | None
    shape: tuple[int, ...]  # of one input; of images as stored: channels, height, width
    normalized: bool  # ready for the model

    def __str__(self) -> str:
        of_classes = f" of {self.classes:,} classes" if self.classes else ""
        return (
            f"{self.source}: {self.train:,} train and {self.val:,} evaluation images{of_classes}, "
            f"{'x'.join(map(str, self.shape))}"
        )


@dataclass(frozen=True)
class InitResult:
    """The recipe written, and what it is for."""

    path: Path
    model: ModelFacts | None
    source: DataFacts | None  # None: not found, or code that was not run
    values: dict[str, Any]  # set in the recipe, by dotted name
    missing: tuple[str, ...]  # sentences about what to set

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            "path": str(self.path),
            "model": self.model and asdict(self.model),
            "data": self.source and asdict(self.source),
            "recipe": self.values,
            "missing": list(self.missing),
        }


def init(
    checkpoint: Path | None = None,
    *,
    out: Path | None = None,
    arch: str | None = None,
    data: str | None = None,
    pickle: bool = False,
    force: bool = False,
) -> InitResult:
    """Write a commented recipe for a checkpoint and data to `out`, by default ./ddq.yaml.

    What is not given is looked for in the working folder. `force` replaces a file. Raises
    UsageError if there is one, or if it cannot be written, and what reading model and data raises.
    """
    out = out or Path(RECIPE_NAME)
    if not force and os.path.lexists(out):
        raise UsageError(f"{out} exists; --force replaces it, -o FILE writes another.")
    check_output(out)
    missing: list[str] = []
    checkpoint = checkpoint or _only(_checkpoints(), "checkpoint", "MODEL", missing)
    model = _describe_model(checkpoint, arch, pickle, missing) if checkpoint else None
    data = data or _only(_data_sources(), "data", "--data", missing)
    facts = _describe_data(data) if data else None
    values = _values(model, arch, pickle, data, facts)
    notes = ["Recipe of `ddq finetune`; README.md and `ddqcli/recipe/schema.py` tell more."]
    notes += [str(found) for found in (model, facts) if found]
    if facts and not facts.normalized:
        notes.append("Give data.mean and data.std as in training: they decide the float accuracy.")
    raw = _nested(values)
    Recipe.model_validate(raw)
    folder = os.path.realpath(out.parent)
    move_paths(raw, lambda path: os.path.relpath(path, folder), os.path.exists)
    text = commented_recipe({key: _field(raw, key) for key in values}, notes)
    inputs = [checkpoint] if checkpoint else []
    write_atomic(out, lambda temporary: temporary.write_text(text, "utf-8"), inputs=inputs)
    return InitResult(out, model, facts, values, tuple(missing))


def _values(
    model: ModelFacts | None,
    arch: str | None,
    pickle: bool,
    data: str | None,
    facts: DataFacts | None,
) -> dict[str, Any]:
    """Return the fields to set, by dotted name."""
    is_gray = facts is not None and not facts.normalized and facts.shape[0] == 1
    values = {
        "model.checkpoint": model and model.checkpoint,
        "model.arch": (model and model.arch) or arch,
        "model.pickle": pickle or None,
        "data.source": data,
        "data.mean": _GRAY if is_gray else None,
        "data.std": _GRAY if is_gray else None,
        "budget.target_bits": _TARGET_BITS,
    }
    return {key: value for key, value in values.items() if value is not None}


def _describe_model(path: Path, arch: str | None, pickle: bool, missing: list[str]) -> ModelFacts:
    """Read a checkpoint and recognize its network. Raises DDQError unless that alone fails."""
    checkpoint = load_checkpoint(path, pickle=pickle)
    tensors = checkpoint.tensors.values()
    found = arch
    if arch is not None or checkpoint.module is None:
        try:
            found = build_model(checkpoint, arch, {}).arch
        except DDQError as error:
            if arch is not None:
                raise
            missing.append(f"model.arch: {error}")
    return ModelFacts(
        checkpoint=str(path),
        arch=found,
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def _describe_data(text: str) -> DataFacts | None:
    """Open the data and look at some images; None for a factory, whose code does not run yet."""
    source = open_source(DataSection(source=text))
    if source is None:
        return None
    if isinstance(source.train, TensorDataset):
        shape, normalized = tuple(source.train.tensors[0].shape[1:]), True
    else:
        sizes, gray = sample_sizes(source)
        width, height = next(iter(sizes.values()))
        shape, normalized = (1 if gray else 3, height, width), False
    return DataFacts(text, len(source.train), len(source.val), source.count, shape, normalized)


def _checkpoints() -> list[Path]:
    """Return the checkpoints in the working folder, without files that ddq exported."""
    files = sorted(path for path in Path().iterdir() if path.suffix in CHECKPOINTS)
    return [path for path in files if path.is_file() and not is_artifact(path)]


def _data_sources() -> list[str]:
    """Return the image folders and .npz files in the working folder."""
    folders = [
        path
        for path in Path().iterdir()
        if (path / "train").is_dir() and any((path / val).is_dir() for val in ("val", "test"))
    ]
    return sorted(map(str, [*folders, *Path().glob("*.npz")]))


def _only(found: Sequence[T], what: str, flag: str, missing: list[str]) -> T | None:
    """Return the only one found; None otherwise, with a sentence in `missing`."""
    if len(found) == 1:
        return found[0]
    here = f"several are here, {list_names(found)}" if found else "none is here"
    missing.append(f"{what}: {here}; name it with {flag}")
    return None


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for key, value in values.items():
        assign(raw, key, value)
    return raw


def _field(raw: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return raw[section][name]
