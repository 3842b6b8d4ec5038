"""Distillation from the float model (Hinton et al. 2015)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ddqcli.data.load import Data
from ddqcli.errors import DataError
from ddqcli.recipe.schema import DistillSection


def distillation_weight(distill: DistillSection, data: Data) -> float:
    """Which share of the loss is distillation, 0 to 1."""
    default = 0.0 if data.own_loss else 0.9
    return default if distill.weight is None else distill.weight


def flips_at_random(data: Data) -> bool:
    """Whether training mirrors images at random, so that to the network an image and its mirror image are one."""
    return data.augment is not None and data.augment.flip


def check_distillable(seen: dict[str, Tensor] | None) -> None:
    """Raise DataError if what `probe` saw of a model is not finite scores [B,K] of two classes or more."""
    output = seen["output"] if seen else None
    if output is None:
        kind = "no tensor"
    elif output.dim() != 2 or output.shape[1] < 2:
        kind = f"of shape {list(output.shape)}"
    elif not output.isfinite().all():
        kind = "partly infinite or NaN"
    else:
        return
    scores = "Distillation is of finite scores [B,K] of two classes or more"
    raise DataError(f"{scores}, and the model's output is {kind}; set train.distill.weight=0.")


def distillation(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL divergence of the outputs from the float model's, both softened (Hinton et al. 2015); mean over the batch.

    In float32 always: rounded to bfloat16, two outputs that are alike differ mostly by rounding.
    """
    soft, goal = (F.log_softmax(scores.float() / temperature, -1) for scores in (output, target))
    return F.kl_div(soft, goal, reduction="batchmean", log_target=True) * temperature**2
