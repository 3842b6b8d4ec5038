"""The recipe: everything `ddq finetune` can be told, with its defaults and what is allowed; knows no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ddqcli.recipe.size import parse_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Bits = Annotated[int, Field(ge=1, le=8)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Levels = Literal["learned", "uniform", "power_of_two"]


def _only_plain(value: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments travel in the exported file as JSON."""
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, (list, dict)):
            stack += item.values() if isinstance(item, dict) else item
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{item} is not finite")
        elif not isinstance(item, (str, int, float, type(None))):
            raise ValueError(
                f"{item!r} is a {type(item).__name__}; quote it, or give numbers, lists or mappings"
            )
    return value


Keywords = Annotated[dict[str, Any], AfterValidator(_only_plain)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool and True not in get_args(kind):
            raise ValueError("true and false have no meaning here")  # Python counts them as 1 and 0
        return value


class ModelSection(_Section):
    """Which network, and how to build it."""

    checkpoint: str | None = None
    arch: str | None = (
        None  # a torchvision name, package.module:factory, or path/to/file.py:factory
    )
    kwargs: Keywords = {}  # keyword arguments of the factory
    pickle: bool = False  # allow a pickled module: running its code is then possible


class DataSection(_Section):
    """Where the images come from and what is done to them."""

    source: str | None = None  # a folder, a .npz, DATASET:ROOT of torchvision, or module:factory
    kwargs: Keywords = {}  # keyword arguments of the factory
    weights: str | None = None  # a torchvision weights entry whose preprocessing to use
    mean: list[Finite] = list(IMAGENET_MEAN)
    std: list[Positive] = list(IMAGENET_STD)
    resize: Annotated[int, Field(ge=1)] | None = (
        None  # shorter side, pixels; None keeps small images, 256 for large ones
    )
    crop: Annotated[int, Field(ge=1)] | None = (
        None  # centre (validation) or random (training) crop, pixels
    )
    pad: Annotated[int, Field(ge=0)] = (
        4  # training: random crop after padding by so many pixels (small images)
    )
    # What they are padded with; auto: as the model's BatchNorm knows them, or black.
    fill: Literal["auto", "black", "mean"] = "auto"
    # Training: random horizontal flip; auto: if the float model reads mirrored images as well.
    flip: Literal[True, False, "auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 128
    workers: Annotated[int, Field(ge=0)] = (
        2  # processes that decode, where a set is too large for memory
    )

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

    bits: Bits | None = None  # the first and the last layer's have 8, if no override says otherwise
    levels: Literal["auto", "learned", "uniform"] = (
        "auto"  # auto: learned up to 4 bits, a learned uniform step above
    )


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

    target_bits: Annotated[Finite, Field(gt=0, le=32)] | None = (
        None  # average stored bits a quantized weight
    )
    target_size: str | None = None  # all tensors of the file: 150kB, 1.8MB, 12%
    count: Literal["bytes", "eqn6"] = "bytes"  # eqn6: the paper's sum of N * 2^s, as printed

    @field_validator("target_size", mode="before")
    @classmethod
    def _is_a_size(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(
            value, bool
        ):  # 150000, which YAML takes for a number
            value = str(value)
        if isinstance(value, str):
            parse_size(value, 2**30)  # of whatever model
        return value

    @model_validator(mode="after")
    def _one_target(self) -> BudgetSection:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("target_bits and target_size are both given; give one")
        if self.target_size is not None and self.count == "eqn6":
            raise ValueError("count eqn6 knows no sizes; give target_bits with it")
        return self

    @property
    def target(self) -> str:
        """The target in words: `4 bits`, `150kB`."""
        return self.target_size or (
            f"{self.target_bits:g} bits" if self.target_bits is not None else "none"
        )


class GatesSection(_Section):
    """How gates move. `fisher` is ours (see README); `paper` is the literal rule of Sec. 4.2; `fixed` allocates once."""

    rule: Literal["fisher", "paper", "fixed"] = "fisher"
    looks: Annotated[int, Field(ge=1)] = (
        20  # about as often are gates weighed before they freeze (fisher)
    )
    descent: Fraction = (
        0.0  # share of the run over which the budget falls from max_bits to the target (fisher)
    )
    freeze: Fraction = 0.5  # share of the run after which gates no longer move
    lr: Positive = 1e-8  # paper rule: step size of the gate logits
    init: Positive = 1e-8  # paper rule: first value of the gate logits
    alpha: Annotated[
        float, Field(le=0, allow_inf_nan=False)
    ] = -0.02  # Eqn 7's exponent while the budget is exceeded


class DistillSection(_Section):
    """Learning from the float model's scores [B,K] beside the labels (Hinton et al. 2015)."""

    weight: Fraction | None = (
        None  # of the loss; 1 needs no labels; by default 0.9, or 0 if the data bring their own loss
    )
    temperature: Positive = 4.0


class TrainSection(_Section):
    """The finetuning itself."""

    epochs: Annotated[int, Field(ge=0)] = 5
    max_steps: Annotated[int, Field(ge=0)] | None = None  # ends the run earlier
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01  # of weights, falling to 0 along a cosine
    momentum: Fraction = 0.9  # sgd
    weight_decay: NonNegative = 1e-4
    levels_lr: Positive = 0.1  # of levels, in steps of the level grid (1/255 of the range); Adam
    correction: NonNegative = (
        1.0  # gradient correction (Eqn 9) as a multiple of the layer's Fisher; 0 switches it off
    )
    distill: DistillSection = DistillSection()
    # Share of the run, rounded up to an epoch, after which BatchNorm's statistics, estimated anew, stay; not before the bits do.
    bn_freeze: Fraction = 0.75
    bn_batches: Annotated[int, Field(ge=0)] = (
        64  # over which they are estimated; 0: the running ones stay
    )
    save_every: Annotated[int, Field(ge=1)] = 500  # steps between two checkpoints
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


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

    def of(self, checkpoint: Path) -> Recipe:
        """This recipe for the model in `checkpoint`."""
        return self.model_copy(
            update={"model": self.model.model_copy(update={"checkpoint": str(checkpoint)})}
        )
