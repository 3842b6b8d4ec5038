"""Calibration: input ranges and weight gradients of the float model, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.data.seeding import generator
from ddqcli.errors import DataError
from ddqcli.qat.model import QuantizedModel
from ddqcli.training import distributed
from ddqcli.training.evaluate import output_of


def calibrate(
    quantized: QuantizedModel,
    data: Data,
    batches: int,
    watch: Callable[[float], None],
    teacher: nn.Module | None = None,
) -> None:
    """Fit the input quantizers, and call `watch` with each of `batches` weight gradients in place.

    The argument of `watch` is the share of the batch that this rank has averaged over. A smaller
    share multiplies the square of the noise, which is nearly all of a trained model's gradient.

    With a `teacher` (the float model, for runs that need no labels), labels are drawn from its
    outputs [B, C], as the Fisher information is defined. A divergence from the float model would
    not do: its gradient is zero at the float weights.

    An input that no batch reaches stays float. Raises DataError for a batch that is not finite.
    """
    for quantizer in quantized.activations.values():
        quantizer.observing = True
    model = quantized.model
    with _eval_mode(model):
        for number, (x, y) in enumerate(islice(data.train.epoch(0), batches)):
            _require_finite_batch(x, number)
            output = output_of(model(x.clone()))
            if teacher is None:
                loss = data.loss(output, y)
            else:
                labels = _draw_labels(output_of(teacher(x)), number)
                loss = nn.functional.cross_entropy(output, labels.to(output.device))
            torch.autograd.backward(loss)
            watch(1 / distributed.shard().count)
            model.zero_grad(set_to_none=True)
    unreached = [name for name, quantizer in quantized.activations.items() if not quantizer.fit()]
    for name in unreached:
        quantized.keep_input_float(
            name, "the layer's own forward is never called, so its input is not seen"
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, so that forward passes change no statistics."""
    training = model.training
    model.eval()
    yield
    model.train(training)


def _require_finite_batch(x: Tensor, number: int) -> None:
    if x.is_floating_point() and not x.isfinite().all():
        raise DataError(
            f"Batch {number} of the training data holds NaN or infinite values; repair the data."
        )


def _draw_labels(logits: Tensor, batch: int) -> Tensor:
    """Draw one class [B] per sample from the softmax of `logits` [B, C]."""
    probabilities = logits.detach().float().softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator("calibrate", batch))[:, 0]
