"""The fields of a recipe, their defaults and allowed values; any can be set with `--set`."""

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

from ddqcli.errors import UsageError
from ddqcli.recipe.size import parse_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Bits = Annotated[int, Field(ge=1, le=8)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Levels = Literal["learned", "uniform", "power_of_two"]
Granularity = Literal["layer", "channel"]


def _check_json_values(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON cannot hold: keyword arguments are stored in the exported file."""
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


Keywords = Annotated[dict[str, Any], AfterValidator(_check_json_values)]


class _Section(BaseModel):
    """A part of the recipe: immutable, without unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        accepts_bool = annotation is bool or True in get_args(annotation)
        if isinstance(value, bool) and not accepts_bool:
            raise ValueError("true and false have no meaning here")  # Python counts them as 1 and 0
        return value


class ModelSection(_Section):
    """The network and how to build it."""

    checkpoint: str | None = None
    """File with the trained weights."""
    arch: str | None = None
    """A torchvision name, package.module:factory, or path/to/file.py:factory. None: recognize a
    torchvision network by the checkpoint's keys and shapes."""
    kwargs: Keywords = {}
    """Keyword arguments of the factory."""
    pickle: bool = False
    """Allow a pickled module, whose code then runs."""


class DataSection(_Section):
    """The images or other samples, and their preprocessing."""

    source: str | None = None
    """A folder with train/ and val/, a .npz file, DATASET:ROOT of torchvision, or module:factory.
    """
    kwargs: Keywords = {}
    """Keyword arguments of the data set or factory."""
    weights: str | None = None
    """A torchvision weights entry whose preprocessing to use."""
    mean: list[Finite] = list(IMAGENET_MEAN)
    """Normalization of values 0..1: mean of each channel, or one for all."""
    std: list[Positive] = list(IMAGENET_STD)
    """Normalization: standard deviation of each channel, or one for all."""
    resize: PositiveCount | None = None
    """Resize the shorter side to this many pixels. None keeps small images; 256 for large ones."""
    crop: PositiveCount | None = None
    """Crop to this many pixels: the center in validation, at random in training."""
    pad: Count = 4
    """Training on small images: random crop after padding by this many pixels."""
    fill: Literal["auto", "black", "mean"] = "auto"
    """Color of the padding. auto: the one that fits the model's BatchNorm statistics, else black.
    """
    flip: Literal[True, False, "auto"] = "auto"
    """Training: random horizontal flips. auto: if the float model recognizes flipped images too."""
    batch_size: PositiveCount = 128
    """Training samples in a step."""
    workers: Count = 2
    """Processes that load samples of a data set too large for memory."""

    @model_validator(mode="after")
    def _check_channels(self) -> DataSection:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give as many of each"
            )
        return self

    def require_source(self) -> str:
        """Return the source. Raises UsageError if there is none."""
        if not self.source:
            raise UsageError(
                "No data are named; give --data, or data.source in a recipe: a folder, a .npz "
                "file, DATASET:ROOT or module:factory."
            )
        return self.source


class WeightsSection(_Section):
    """Quantization of weights (Eqn 3) and biases (Eqn 5)."""

    levels: Levels = "learned"
    max_bits: Bits = 8
    """Maximum bits of a weight tensor."""
    min_bits: Bits = 1
    """Minimum bits of a weight tensor."""
    bits_offered: list[Bits] = Field(default=[1, 2, 3, 4, 5, 6, 7, 8], min_length=1)
    """Bit-widths that the target has. Core ML, for one, lacks 5 and 7: [1, 2, 3, 4, 6, 8]."""
    granularity: Granularity = "layer"
    """One set of levels for a layer, or for each output channel."""
    init: Literal["lloyd_max", "uniform"] = "lloyd_max"
    """Levels before training."""
    bias_bits: Bits | None = 8
    """None keeps biases in float."""

    @model_validator(mode="after")
    def _check_order(self) -> WeightsSection:
        if self.min_bits > self.max_bits:
            raise ValueError(f"min_bits {self.min_bits} is above max_bits {self.max_bits}")
        return self


class ActivationsSection(_Section):
    """Quantization of the input of each quantized layer."""

    bits: Bits | None = None
    """None keeps activations in float. The first and last layer get 8 bits unless overridden."""
    levels: Literal["auto", "learned", "uniform"] = "auto"
    """auto: learned levels up to 4 bits, uniform levels with a learned step size above."""


class Override(_Section):
    """Other values for the layers that match; later overrides win over earlier ones."""

    match: str | None = None
    """A layer's name, or a pattern with * and ?."""
    type: str | None = None
    """A module type: Conv2d, Linear, ..."""
    kind: Literal["Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"] | None = None
    """`match` names parameters that no layer of PyTorch reads, such as `blocks.*.qkv` in F.linear;
    they are weights of this kind, to be quantized."""
    skip: bool = False
    """Keep the layer in float."""
    bits: Bits | None = None
    """A fixed bit-width, not subject to the gates."""
    min_bits: Bits | None = None
    max_bits: Bits | None = None
    levels: Levels | None = None
    granularity: Granularity | None = None
    act_bits: Annotated[int, Field(ge=0, le=8)] | None = None
    """0 keeps the layer's input in float."""

    @model_validator(mode="after")
    def _check_condition(self) -> Override:
        if self.match is None and self.type is None:
            raise ValueError("says nothing about which layers it is for; give match or type")
        if self.kind is not None and self.match is None:
            raise ValueError("kind says what the parameters are that match names; give match")
        return self


class Budget(_Section):
    """The memory that a quantized model may take.

    Give `target_bits` or `target_size`, not both. Without either, every layer stays at its
    `max_bits`. What counts are bytes of the exported file: packed indices, levels, scales and
    gates; for `target_size` also all that stays float. Raises ValueError for unknown sizes.

    >>> Budget(target_bits=4).target
    '4 bits'
    >>> Budget(target_size="150kB").target
    '150kB'
    """

    target_bits: Annotated[Finite, Field(gt=0, le=32)] | None = None
    """Average stored bits of a quantized weight, levels and gates included."""
    target_size: str | None = None
    """Bytes of the exported file: 150kB, 1.8MB, or 12% of the float model's tensors."""
    target_format: Literal["safetensors", "onnx"] = "safetensors"
    """The exported file that target_size is for."""
    count: Literal["bytes", "eqn6"] = "bytes"
    """Unit of target_bits. bytes: as in the file. eqn6: the paper's sum of N * 2^s, as printed."""

    @field_validator("target_size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # YAML reads 150000 as a number
        if isinstance(value, str):
            parse_size(value, 2**30)  # syntax only; the model's size is not known here
        return value

    @model_validator(mode="after")
    def _check_single_target(self) -> Budget:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("target_bits and target_size are both given; give one")
        if self.target_size is not None and self.count == "eqn6":
            raise ValueError("count eqn6 knows no sizes; give target_bits with it")
        if self.target_format != "safetensors" and self.target_size is None:
            raise ValueError("target_format says which file target_size is for; give target_size")
        return self

    @property
    def target(self) -> str:
        """The target in words: `4 bits`, `150kB`, `none`."""
        if self.target_size:
            return self.target_size
        return "none" if self.target_bits is None else f"{self.target_bits:g} bits"


class GatesSection(_Section):
    """The rule by which gates change the bit-widths, and when bit-widths freeze.

    `fisher`: this project's rule (see README). `paper`: the rule of Sec. 4.2, as printed.
    `fixed`: one allocation before training. `method: sdq` samples bit-widths instead.
    """

    rule: Literal["fisher", "paper", "fixed"] = "fisher"
    looks: PositiveCount = 20
    """fisher: about how many times bit-widths are reconsidered before the gates freeze."""
    descent: Fraction = 0.0
    """fisher, sdq: fraction of the run in which the budget falls from max_bits to the target."""
    freeze: Fraction = 0.5
    """Fraction of the run after which the bit-widths freeze."""
    lr: Positive = 1e-8
    """paper: step size of the gate logits."""
    init: Positive = 1e-8
    """paper: initial value of the gate logits."""
    alpha: Annotated[float, Field(le=0, allow_inf_nan=False)] = -0.02
    """paper: exponent of Eqn 7 while the budget is exceeded."""


class DistillSection(_Section):
    """Distillation from the teacher's scores [B, K] (Hinton et al. 2015)."""

    weight: Fraction | None = None
    """Weight in the loss; 1 needs no labels. None: 0.9, or 0 if the data bring their own loss."""
    temperature: Positive = 4.0
    """Softens the scores."""
    layers: list[str] = []
    """Layers whose outputs are distilled, too, by the squared error over their variance."""


class TeacherSection(_Section):
    """Another network to distill from; without a checkpoint, the float model is the teacher."""

    checkpoint: str | None = None
    """File with the teacher's trained weights."""
    arch: str | None = None
    """As model.arch."""
    kwargs: Keywords = {}
    """Keyword arguments of the factory."""

    @model_validator(mode="after")
    def _check_checkpoint(self) -> TeacherSection:
        if self.checkpoint is None and (self.arch is not None or self.kwargs):
            raise ValueError("arch or kwargs are given without a checkpoint of the teacher")
        return self


class TrainSection(_Section):
    """The finetuning."""

    epochs: Count = 5
    """Passes over the training data."""
    max_steps: Count | None = None
    """End the run after this many steps, if that is earlier."""
    compensate: bool = True
    """Assign weights with compensated errors before training, if held-out samples improve by it."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """Optimizer of weights. auto: sgd if the run sees 200,000 training samples or more, else adamw.
    """
    lr: Positive | None = None
    """Learning rate of weights; falls to 0 along a cosine. None: sgd 0.01, adamw 1e-4."""
    momentum: Fraction = 0.9
    """Of sgd."""
    weight_decay: NonNegative = 1e-4
    """Of weights."""
    levels_lr: Positive = 0.1
    """Learning rate of levels (Adam), in steps of the level grid: 1/255 of the range."""
    correction: NonNegative = 1.0
    """Gradient correction (Eqn 9) as a multiple of the layer's Fisher information; 0 turns it off.
    """
    distill: DistillSection = DistillSection()
    teacher: TeacherSection = TeacherSection()
    bin_regularization: NonNegative | None = None
    """Entropy-aware bin regularization (SDQ) once the bit-widths are frozen: its weight in the
    loss. None: 0.1 with method sdq, else 0."""
    batch_norm: Literal["auto", "held", "batch"] = "auto"
    """BatchNorm while training. held: the float model's statistics stay. batch: those of each
    batch. auto: batch if the run sees 200,000 training samples or more in batches of 32 or more."""
    bn_freeze: Fraction = 0.75
    """With batch_norm=batch: fraction of the run, rounded up to an epoch, after which the
    statistics are estimated anew and then frozen; not before the gates freeze."""
    bn_batches: Count = 64
    """Batches for that estimate; 0 keeps the running statistics."""
    save_every: PositiveCount = 500
    """Steps between two training states on disk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The same seed gives the same bytes."""


class Recipe(_Section):
    """A complete recipe."""

    name: str | None = None
    """Names the run folder; by default the checkpoint's name."""
    method: Literal["ddq", "sdq"] = "ddq"
    """ddq: gates decide bit-widths. sdq: bit-widths are sampled (Huang et al., ICML 2022)."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    weights: WeightsSection = WeightsSection()
    activations: ActivationsSection = ActivationsSection()
    overrides: list[Override] = []
    """Other values for some layers."""
    budget: Budget = Budget()
    gates: GatesSection = GatesSection()
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _check_rule(self) -> Recipe:
        if self.method == "sdq" and self.gates.rule != "fisher":
            raise ValueError(
                f"gates.rule={self.gates.rule} is a rule of method ddq, and method is sdq; give one"
            )
        if self.rule == "paper" and set(self.weights.bits_offered) != set(range(1, 9)):
            raise ValueError(
                "gates.rule=paper opens gates one by one, so weights.bits_offered cannot leave "
                "bit-widths out; take gates.rule=fisher"
            )
        return self

    @property
    def rule(self) -> str:
        """Name of the rule that decides bit-widths, in ddqcli.qat.rules.registry."""
        return "sdq" if self.method == "sdq" else self.gates.rule

    def with_checkpoint(self, checkpoint: Path) -> Recipe:
        """Return this recipe for the weights in the file `checkpoint`."""
        model = self.model.model_copy(update={"checkpoint": str(checkpoint)})
        return self.model_copy(update={"model": model})
