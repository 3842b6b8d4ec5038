"""Input ranges and weight gradients of the float model, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn

from ddqcli.data.load import Data
from ddqcli.data.seeding import generator
from ddqcli.errors import DataError
from ddqcli.qat.model import QuantizedModel
from ddqcli.training import distributed
from ddqcli.training.evaluate import output_of


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within: the model is in eval mode, so that looking at it changes no statistics."""
    was = model.training
    model.eval()
    yield
    model.train(was)


def calibrate(
    converted: QuantizedModel,
    data: Data,
    batches: int,
    watch: Callable[[float], None],
    teacher: nn.Module | None = None,
) -> None:
    """Fit the activations' quantizers to a batch and let `watch` see the weights' gradients of `batches` batches.

    Each of several processes averages over its own share of a batch, which `watch` is told: that multiplies the square of the
    noise, which is nearly all there is in the gradients of a trained model.
    With a `teacher` (the float model, where a run needs no labels) the labels are classes drawn from its outputs [B, C]: that is
    Fisher's definition, whereas a divergence from the float model has no gradient at the float weights.
    """
    activations = converted.activations
    for quantizer in activations.values():
        quantizer.observing = True
    model = converted.model
    with eval_mode(model):
        for number, (x, y) in enumerate(islice(data.train.epoch(0), batches)):
            if x.is_floating_point() and not x.isfinite().all():
                raise DataError(
                    f"Batch {number} of the training data holds NaN or infinite values; repair the data."
                )
            output = output_of(model(x.clone()))
            if teacher is None:
                loss = data.loss(output, y)
            else:
                shares = output_of(teacher(x)).detach().float().softmax(-1).cpu()
                drawn = torch.multinomial(shares, 1, generator=generator("calibrate", number))[:, 0]
                loss = nn.functional.cross_entropy(output, drawn.to(output.device))
            loss.backward()
            watch(1 / distributed.shard().count)
            model.zero_grad(set_to_none=True)
    for name in [name for name, quantizer in activations.items() if not quantizer.fit()]:
        converted.keep_input_float(
            name, "the layer's own forward is never called, so its input is not seen"
        )
