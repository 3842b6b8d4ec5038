"""Lines 1 to 3 of Algorithm 1: quantize weights, biases and inputs; compute outputs and loss."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.data.load import Data
from ddqcli.data.trees import Tree, as_float32, call, copied, map_tensors
from ddqcli.recipe.schema import Recipe
from ddqcli.training import distributed
from ddqcli.training.distillation import distillation_weight, flips_at_random, training_loss
from ddqcli.training.features import feature_loss, features_of
from ddqcli.training.network_checks import is_reentrant


class ForwardPass:
    """Computes a batch's outputs, the teacher's, and the loss.

    Args:
        model: the network to train.
        teacher: the float model or another network, for distillation.
        data: the loss of labels; whether images are flipped at random.
        recipe: distillation and precision.

    Attributes:
        teacher: None if labels alone are the target.
        reentrant: a backward pass computes parts of the forward pass again.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, data: Data, recipe: Recipe
    ) -> None:
        self.model, self.data, self.train = model, data, recipe.train
        self.distill_weight = distillation_weight(recipe.train.distill, data)
        self.teacher = teacher if self.distill_weight or not data.labelled else None
        self.reentrant = is_reentrant(model, data)
        self.parallel = distributed.data_parallel(model)
        self.device = next(model.parameters()).device

    def __call__(self, x: Tree, y: Tree) -> tuple[Tree, Tree | None, Tensor]:
        """Return the outputs for x, the teacher's or None, and the loss."""
        bfloat16 = self.train.precision == "bfloat16"
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16),
            # A weight that is read more than once is quantized once.
            nullcontext() if self.reentrant else parametrize.cached(),
        ):
            layers = self.train.distill.layers if self.teacher is not None else []
            with features_of(self.teacher or self.model, layers) as expected:
                target = self.target(x)
            with features_of(self.model, layers) as features:
                output = call(self.parallel, x)
            loss = self.loss(output, y, target)
            if layers:  # of x itself, the first of the teacher's views
                expected = expected[: len(features)]
                loss = loss + self.distill_weight * feature_loss(features, expected)
            return output, target, loss

    @torch.no_grad()
    def target(self, x: Tree) -> Tree | None:
        """Return the teacher's output for x, or None if labels alone are the target.

        Where training flips images at random, it is the mean of the outputs for x and for its flip.
        """
        if self.teacher is None:
            return None
        views = [copied(x)]
        if flips_at_random(self.data):
            views.append(map_tensors(lambda images: images.flip(-1), x))
        outputs = [as_float32(call(self.teacher, view)) for view in views]
        return map_tensors(lambda *views: torch.stack(views).mean(0), *outputs)

    def loss(self, output: Tree, y: Tree, target: Tree | None) -> Tensor:
        """Return the loss of an output: `training_loss` with this run's settings."""
        temperature = self.train.distill.temperature
        return training_loss(self.data, output, y, target, self.distill_weight, temperature)
