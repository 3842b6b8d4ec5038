"""Warn if the data are not what the float model was trained on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.batches import batch_size, take_samples
from ddqcli.data.load import Data
from ddqcli.data.trees import call, copied, tensors

_SAMPLES = 64
# Of the first BatchNorm's input, against its running statistics. Right preprocessing of four
# networks gave a shift up to 0.11 and ratios of 0.76 to 1.11; halved inputs 0.19 to 0.28.
_LARGE_SHIFT = 0.4  # standard deviations, root mean square over channels
_LARGE_RATIO = 2.5  # of variances, geometric mean over channels
_NEAR_CHANCE = 1.5  # times the accuracy of a random class,
_FEWEST_CLASSES = 5  # of so many: with fewer, a poor model is not far from it


@torch.no_grad()
def input_warning(model: nn.Module, data: Data, accuracy: float, normalization: str) -> str | None:
    """Return a sentence with a remedy if the float model and the held-out samples do not fit.

    `accuracy` is the float model's, `normalization` the recipe's, in words. Samples are taken at
    equal distances: data are often sorted by class.
    """
    every = slice(None, None, max(1, -(-data.held_out.samples // _SAMPLES)))
    classes = 0
    with _FirstBatchNorm(model.eval()) as norm:
        for batch in data.held_out.epoch(0):
            if batch_size(batch):
                inputs, targets = take_samples(batch, every)
                classes = _classes(call(model, copied(inputs)), targets, data)
    shift, ratio = norm.compare()
    if shift > _LARGE_SHIFT or not 1 / _LARGE_RATIO < ratio < _LARGE_RATIO:
        return (
            f"the inputs are not as in training: the first BatchNorm ({norm.name}) sees means off "
            f"by {shift:.2g} standard deviations and {ratio:.2g} times the variance; "
            f"give the preprocessing of your training script (now {normalization}; RGB or BGR)"
        )
    if classes >= _FEWEST_CLASSES and accuracy < _NEAR_CHANCE * 100 / classes:
        return (
            f"the float accuracy is near that of a random class, {100 / classes:.1f} %; check the "
            f"order of the classes, the checkpoint and the preprocessing (now {normalization})"
        )
    return None


class _FirstBatchNorm:
    """Observes the inputs of the first BatchNorm that forward passes reach, in a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.name = model, ""
        self._moments: list[Tensor] = []  # of batches: mean and mean square [2, C]
        self._counts: list[int] = []  # values a channel in each

    def __enter__(self) -> _FirstBatchNorm:
        self._handles = [
            module.register_forward_pre_hook(partial(self._observe, name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.running_mean is not None
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _observe(self, name: str, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self.name in ("", name) and args:
            self.name = name
            values = args[0].double().transpose(0, 1).flatten(1)
            self._moments.append(torch.stack([values.mean(1), values.square().mean(1)]))
            self._counts.append(values.shape[1])

    def compare(self) -> tuple[float, float]:
        """Return shift and ratio against the running statistics; 0 and 1 without a BatchNorm."""
        if not self._moments:
            return 0.0, 1.0
        norm: Any = self.model.get_submodule(self.name)
        moments = torch.stack(self._moments, -1)
        weights = torch.tensor(self._counts, dtype=moments.dtype, device=moments.device)
        mean, square = moments @ weights / weights.sum()
        variance = norm.running_var + norm.eps
        shift = (mean - norm.running_mean).square() / variance
        ratio = (square - mean.square() + norm.eps) / variance
        return float(shift.mean().sqrt()), float(ratio.log().mean().exp())


def _classes(output: Any, targets: Any, data: Data) -> int:
    """Return K for scores [B, K] beside classes [B] that the default metric judges, else 0."""
    scores, labels = tensors(output), tensors(targets)
    if data.own_metric or not data.labelled or len(scores) != 1 or len(labels) != 1:
        return 0
    score, label = scores[0], labels[0]
    is_class = label.ndim == 1 and not label.is_floating_point()
    return score.shape[1] if score.ndim == 2 and is_class else 0
