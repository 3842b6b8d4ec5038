"""Distillation from the float model or another teacher, whose outputs are any tree of tensors.

Tensors of class scores are compared by the Kullback-Leibler divergence of their classes (Hinton et
al. 2015). These are scores [B, K], unless a target is a floating-point tensor of this shape, and
tensors that are the shape of an integer target but for one axis: [B, K, H, W] beside classes
[B, H, W]. Other floating-point tensors are compared by the mean squared error over the variance of
the teacher's. The losses of all tensors add up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ddqcli.data.load import Data
from ddqcli.data.trees import Tree, all_finite, tensors
from ddqcli.errors import DataError, UsageError
from ddqcli.recipe.schema import DistillSection

_DEFAULT_WEIGHT = 0.9
_CONSTANT = 1e-6  # variance over mean square, below which an output does not vary


def distillation_weight(distill: DistillSection, data: Data) -> float:
    """Return the share of the loss (0 to 1) that is distillation.

    The default is 0 where the data bring their own loss and no distillation, 1 without labels, and
    0.9 otherwise. Raises DataError if it leaves a share to labels that the data lack.
    """
    if distill.weight is None:
        if data.own_loss and not (data.distill or distill.layers):
            return 0.0
        return _DEFAULT_WEIGHT if data.labelled or data.own_loss else 1.0
    if distill.weight < 1 and not (data.labelled or data.own_loss):
        raise DataError(
            f"train.distill.weight is {distill.weight:g}, but the data have no labels for the rest "
            "of the loss; set it to 1, or give a data factory with its own loss."
        )
    return distill.weight


def flips_at_random(data: Data) -> bool:
    """True if training flips images at random, so that an image and its flip share one target."""
    return data.augment is not None and data.augment.flip


def check_distillable(output: Tree) -> None:
    """Raise DataError unless the float model's output holds floating-point tensors, all finite."""
    if not _floating(output):
        problem = "no floating-point tensor"
    elif not all_finite(output):
        problem = "partly infinite or NaN"
    else:
        return
    raise DataError(
        f"Distillation needs finite outputs, and the model's output is {problem}; set "
        "train.distill.weight=0."
    )


def check_same_outputs(output: Tree, teacher_output: Tree, name: str) -> None:
    """Raise UsageError unless the teacher's outputs are as the model's: finite, of these shapes.

    `name` is the teacher's.
    """
    expected, actual = ([list(x.shape) for x in tensors(t)] for t in (output, teacher_output))
    if actual != expected:
        raise UsageError(
            f"The teacher {name} returns outputs of shape {_join(actual)}, and the model of "
            f"{_join(expected)}; a teacher needs the same classes."
        )
    check_distillable(teacher_output)


def training_loss(
    data: Data, output: Tree, y: Tree, target: Tree | None, weight: float, temperature: float
) -> Tensor:
    """Return `weight` parts of distillation towards `target`, the rest of the data's own loss.

    What has no part is not computed. Without a `target`, all is the data's own loss.
    """
    if target is None or not weight:
        return data.loss(output, y)
    if data.distill is not None:
        divergence = data.distill(output, target)
    else:
        divergence = distillation(output, target, temperature, y)
    if weight == 1:
        return divergence
    return weight * divergence + (1 - weight) * data.loss(output, y)


def distillation(output: Tree, target: Tree, temperature: float, labels: Tree = None) -> Tensor:
    """Return the distance of the quantized model's output from the teacher's.

    Args:
        output: of the quantized model.
        target: of the teacher.
        temperature: T of class scores; their loss is T^2 * KL(softened target || softened output),
            mean over samples and places.
        labels: the targets of the samples, by whose shapes class scores are told from values.

    Computed in float32 even under autocast. In bfloat16, two similar outputs differ mostly by
    rounding. Raises DataError if the outputs differ in shape.
    """
    losses = [
        squared_error(o, t) if axis is None else _divergence(o, t, temperature, axis)
        for o, t, axis in matched(output, target, labels)
    ]
    return torch.stack(losses).sum()


def matched(
    output: Tree, target: Tree, labels: Tree
) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Yield the floating-point tensors of two outputs in float32, and the axis of class scores.

    The axis is None for other values. Raises DataError if the outputs differ in shape.
    """
    outputs, targets = _floating(output), _floating(target)
    shapes = [[list(x.shape) for x in each] for each in (outputs, targets)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"The model's outputs in training, {shapes[0]}, differ in shape from those in "
            f"evaluation, {shapes[1]}, so it cannot be distilled; set train.distill.weight=0."
        )
    for o, t in zip(outputs, targets, strict=True):
        yield o.float(), t.float().to(o.device), score_axis(t, labels)


def score_axis(output: Tensor, labels: Tree) -> int | None:
    """Return the axis of an output that holds class scores; None for other values."""
    known = tensors(labels)
    if any(y.is_floating_point() and y.shape == output.shape for y in known):
        return None
    if output.ndim == 2:
        return 1 if output.shape[1] > 1 else None
    classes = [y.shape for y in known if not y.is_floating_point()]
    for axis in range(1, output.ndim):
        if (*output.shape[:axis], *output.shape[axis + 1 :]) in classes and output.shape[axis] > 1:
            return axis
    return None


def rows_of_scores(scores: Tensor, axis: int) -> Tensor:
    """Return class scores along `axis` as [N, K], a row for each sample and place."""
    return scores.movedim(axis, -1).reshape(-1, scores.shape[axis])


def scale_of(target: Tensor) -> Tensor:
    """Return the variance of a float output; its mean square if it does not vary."""
    variance, mean_square = target.var(correction=0), target.square().mean()
    varies = variance > _CONSTANT * mean_square
    return torch.where(varies, variance, mean_square).clamp_min(torch.finfo(target.dtype).tiny)


def _divergence(output: Tensor, target: Tensor, temperature: float, axis: int) -> Tensor:
    log_output, log_target = (
        F.log_softmax(rows_of_scores(scores, axis) / temperature, -1) for scores in (output, target)
    )
    return F.kl_div(log_output, log_target, reduction="batchmean", log_target=True) * temperature**2


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over the variance of the target."""
    return F.mse_loss(output, target) / scale_of(target)


def _join(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes))


def _floating(tree: Tree) -> list[Tensor]:
    return [x for x in tensors(tree) if x.is_floating_point()]
