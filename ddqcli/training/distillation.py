"""Distillation from the float model or another teacher (Hinton et al. 2015)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ddqcli.data.load import Data
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import DistillSection

_DEFAULT_WEIGHT = 0.9


def distillation_weight(distill: DistillSection, data: Data) -> float:
    """Return the share of the loss (0 to 1) that is distillation.

    The default is 0 where the data bring their own loss, since their outputs may not be class
    scores, and 0.9 otherwise.
    """
    if distill.weight is not None:
        return distill.weight
    return 0.0 if data.own_loss else _DEFAULT_WEIGHT


def flips_at_random(data: Data) -> bool:
    """True if training flips images at random, so that an image and its flip share one target."""
    return data.augment is not None and data.augment.flip


def check_distillable(probed: dict[str, Tensor] | None) -> None:
    """Raise DataError unless the output in `probe`'s result is finite class scores [B, K >= 2]."""
    output = probed["output"] if probed else None
    if output is None:
        problem = "no tensor"
    elif output.dim() != 2 or output.shape[1] < 2:
        problem = f"of shape {list(output.shape)}"
    elif not output.isfinite().all():
        problem = "partly infinite or NaN"
    else:
        return
    raise DataError(
        "Distillation needs finite scores [B, K] of two classes or more, and the model's output "
        f"is {problem}; set train.distill.weight=0."
    )


def check_same_outputs(
    model: dict[str, Tensor] | None, teacher: dict[str, Tensor] | None, name: str
) -> None:
    """Raise UsageError unless the teacher's output in `probe`'s results is like the model's.

    It is checked as the model's is: finite scores of the same shape. `name` is the teacher's.
    """
    expected = list(model["output"].shape) if model else None
    found = list(teacher["output"].shape) if teacher else None
    if found != expected:
        raise UsageError(
            f"The teacher {name} returns outputs of shape {found}, and the model of {expected}; a "
            "teacher needs the same classes."
        )
    check_distillable(teacher)


def distillation(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 * KL(softened target || softened output), mean over the batch.

    Args:
        output: scores [B, K] of the quantized model.
        target: scores [B, K] of the teacher.

    Computed in float32 even under autocast. In bfloat16, two similar outputs differ mostly by
    rounding.
    """
    log_output, log_target = (
        F.log_softmax(scores.float() / temperature, -1) for scores in (output, target)
    )
    return F.kl_div(log_output, log_target, reduction="batchmean", log_target=True) * temperature**2
