"""The recipe: everything `ddq finetune` can be told, with its defaults; knows no torch.

A recipe is a YAML file; flags and `--set key=value` win over it. All faults are reported at once, each with its path,
its value and what is allowed. Paths inside a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ddqcli.errors import RecipeError, UsageError

RECIPE_NAME = "ddq.yaml"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Bits = Annotated[int, Field(ge=1, le=8)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Levels = Literal["learned", "uniform", "power_of_two"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """Which network, and how to build it."""

    checkpoint: str | None = None
    arch: str | None = None  # a torchvision name, package.module:factory, or path/to/file.py:factory
    kwargs: dict[str, Any] = {}  # keyword arguments of the factory
    pickle: bool = False  # allow a pickled module: running its code is then possible


class DataSection(_Section):
    """Where the images come from and what is done to them."""

    source: str | None = None  # a folder, a .npz, DATASET:ROOT of torchvision, or module:factory
    kwargs: dict[str, Any] = {}  # keyword arguments of the factory
    weights: str | None = None  # a torchvision weights entry whose preprocessing to use
    mean: list[float] = list(IMAGENET_MEAN)
    std: list[Positive] = list(IMAGENET_STD)
    resize: Annotated[int, Field(ge=1)] | None = (
        None  # shorter side, pixels; None keeps small images, 256 for large ones
    )
    crop: Annotated[int, Field(ge=1)] | None = None  # centre (validation) or random (training) crop, pixels
    pad: Annotated[int, Field(ge=0)] = 4  # training: random crop after padding by so many pixels (small images)
    flip: bool = True  # training: random horizontal flip
    batch_size: Annotated[int, Field(ge=1)] = 128
    workers: Annotated[int, Field(ge=0)] = 2  # processes that decode, where a set is too large for memory

    @model_validator(mode="after")
    def _one_std_for_each_mean(self) -> DataSection:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give one of each for a channel"
            )
        return self


class WeightsSection(_Section):
    """Quantization of weights (Eqn 3) and of biases (Eqn 5)."""

    levels: Levels = "learned"
    max_bits: Bits = 8
    min_bits: Bits = 1
    granularity: Literal["layer", "channel"] = "layer"
    init: Literal["lloyd_max", "uniform"] = "lloyd_max"
    bias_bits: Bits | None = 8  # None keeps biases in float

    @model_validator(mode="after")
    def _ordered(self) -> WeightsSection:
        if self.min_bits > self.max_bits:
            raise ValueError(f"min_bits {self.min_bits} is above max_bits {self.max_bits}")
        return self


class ActivationsSection(_Section):
    """Quantization of each quantized layer's input; None keeps activations in float."""

    bits: Bits | None = None
    levels: Literal["auto", "learned", "uniform"] = "auto"  # auto: learned up to 4 bits, a learned uniform step above


class Override(_Section):
    """What differs for the layers that match; later overrides win over earlier ones."""

    match: str | None = None  # a name, or a pattern with * and ?
    type: str | None = None  # a module type: Conv2d, Linear, ...
    skip: bool = False  # keep in float
    bits: Bits | None = None  # fixed: these layers take no part in the trade of bits
    min_bits: Bits | None = None
    max_bits: Bits | None = None
    levels: Levels | None = None
    granularity: Literal["layer", "channel"] | None = None
    act_bits: Annotated[int, Field(ge=0, le=8)] | None = None  # 0 keeps this layer's input in float

    @model_validator(mode="after")
    def _matches_something(self) -> Override:
        if self.match is None and self.type is None:
            raise ValueError("says nothing about which layers it is for; give match or type")
        return self


class BudgetSection(_Section):
    """What the result may weigh; at most one of the two. Without either, every layer stays at max_bits."""

    target_bits: Annotated[float, Field(gt=0, le=32)] | None = None  # average stored bits a quantized weight
    target_size: str | None = None  # all tensors of the file: 150kB, 1.8MB, 12%
    count: Literal["bytes", "eqn6"] = "bytes"  # eqn6: the paper's sum of N * 2^s, as printed

    @field_validator("target_size")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value, 100)
        return value

    @model_validator(mode="after")
    def _one_target(self) -> BudgetSection:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("target_bits and target_size are both given; give one")
        return self


class GatesSection(_Section):
    """How gates move. `fisher` is ours (see README); `paper` is the literal rule of Sec. 4.2; `fixed` allocates once."""

    rule: Literal["fisher", "paper", "fixed"] = "fisher"
    looks: Annotated[int, Field(ge=0)] = 20  # times the gates are weighed anew before they freeze (fisher)
    descent: Fraction = 0.0  # share of the run over which the budget falls from max_bits to the target (fisher)
    freeze: Fraction = 0.5  # share of the run after which gates no longer move
    lr: Positive = 1e-8  # paper rule: step size of the gate logits
    init: Positive = 1e-8  # paper rule: first value of the gate logits
    alpha: Annotated[float, Field(le=0)] = -0.02  # Eqn 7's exponent while the budget is exceeded


class DistillSection(_Section):
    """Learning from the float model's outputs beside the labels."""

    weight: Fraction = 0.0  # of the loss; 1 needs no labels
    temperature: Positive = 1.0


class TrainSection(_Section):
    """The finetuning itself."""

    epochs: Annotated[int, Field(ge=0)] = 5
    max_steps: Annotated[int, Field(ge=0)] | None = None  # ends the run earlier
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01  # of weights, falling to 0 along a cosine
    momentum: Fraction = 0.9  # sgd
    weight_decay: NonNegative = 1e-4
    levels_lr: Positive = 0.1  # of levels, in steps of the level grid (1/255 of the range); Adam
    correction: NonNegative = 1.0  # gradient correction (Eqn 9) as a multiple of the layer's Fisher; 0 switches it off
    distill: DistillSection = DistillSection()
    bn_batches: Annotated[int, Field(ge=0)] = 64  # batches over which BatchNorm is re-estimated at the end; 0: not
    save_every: Annotated[int, Field(ge=1)] = 500  # steps between two checkpoints
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0


class Recipe(_Section):
    """A whole recipe."""

    name: str | None = None
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    weights: WeightsSection = WeightsSection()
    activations: ActivationsSection = ActivationsSection()
    overrides: list[Override] = []
    budget: BudgetSection = BudgetSection()
    gates: GatesSection = GatesSection()
    train: TrainSection = TrainSection()

    def dump(self) -> str:
        """The recipe as YAML, every field written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


def parse_size(text: str, float_bytes: int) -> int:
    """Bytes meant by `150kB`, `1.8MB`, `96KiB` or `12%` (of float_bytes). Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kKmMgG]?[iI]?[bB]?)\s*", text)
    if not found or found[2].lower() not in {"%", *_UNITS}:
        raise ValueError(f"{text!r} is not a size; write 150kB, 1.8MB, 96KiB or 12%")
    number = float(found[1])
    size = number / 100 * float_bytes if found[2] == "%" else number * _UNITS[found[2].lower()]
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return int(size)


def find_recipe(checkpoint: Path | None) -> Path | None:
    """`ddq.yaml` in the working folder or beside the checkpoint, if there is one."""
    folders = [Path(), *([checkpoint.parent] if checkpoint else [])]
    return next((folder / RECIPE_NAME for folder in folders if (folder / RECIPE_NAME).is_file()), None)


def differences(first: Recipe, second: Recipe) -> list[str]:
    """The fields in which two recipes differ, as `train.lr: 0.01, now 0.02`."""
    before, after = _flattened(first.model_dump()), _flattened(second.model_dump())
    return [
        f"{key}: {before.get(key)}, now {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def _flattened(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, dict) and value and key != "kwargs"
        flat |= _flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def load_recipe(path: Path | None, flags: dict[str, Any] | None = None) -> Recipe:
    """The recipe in `path` (or none) with `flags`, {'train.epochs': 2, ...}, over it. Raises RecipeError, UsageError."""
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise UsageError(f"The recipe {path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(str(path), [f"  not YAML: {' '.join(str(error).split())}"]) from error
        if not isinstance(raw, dict):
            raise RecipeError(str(path), [f"  holds a {type(raw).__name__} where sections such as train: are expected"])
        _anchor_paths(raw, path.parent)
    for key, value in (flags or {}).items():
        _assign(raw, key, value)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        source = str(path) if path else "The recipe made of the flags"
        raise RecipeError(source, [_fault(detail) for detail in error.errors()]) from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """`train.lr=0.02` as ('train.lr', 0.02); the value is read as YAML. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key.strip()):
        raise UsageError(f"--set {text} is not an assignment; write it as --set train.lr=0.02")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {text}: the value is not YAML; write it as --set data.mean='[0.5, 0.5, 0.5]'"
        ) from error


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, field = key.split(".")
    for section in sections:
        below = raw.get(section)
        if not isinstance(below, dict):
            below = raw[section] = {}
        raw = below
    if field == "target_bits":
        raw.pop("target_size", None)  # a flag replaces the recipe's target, whichever of the two it was
    elif field == "target_size":
        raw.pop("target_bits", None)
    raw[field] = value


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths a recipe names relative to the recipe's folder instead of the working folder."""
    for section, field in (("model", "checkpoint"), ("model", "arch"), ("data", "source")):
        values = raw.get(section)
        if not isinstance(values, dict) or not isinstance(values.get(field), str):
            continue
        head, colon, tail = values[field].partition(":")
        if field == "source" and colon and not head.endswith(".py"):
            head, tail = tail, head  # DATASET:ROOT of torchvision: the path comes second
            if (folder / head).exists():
                values[field] = f"{tail}:{folder / head}"
        elif (folder / head).exists():
            values[field] = f"{folder / head}{colon}{tail}"


def _fault(detail: Any) -> str:
    """One fault of pydantic's as one line: path, value, what is allowed."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        section = Recipe
        for part in detail["loc"][:-1]:
            if isinstance(part, str):
                annotation = section.model_fields[part].annotation
                section = Override if part == "overrides" else annotation  # type: ignore[assignment]
        known = sorted(section.model_fields)
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"  {path}: unknown field; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return f"  {path or 'recipe'}{shown}: {message[0].lower()}{message[1:]}"
