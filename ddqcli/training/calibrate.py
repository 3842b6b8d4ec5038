"""Calibration: input ranges and weight gradients of the float model, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.data.seeding import generator
from ddqcli.data.trees import Tree, call, copied
from ddqcli.qat.model import QuantizedModel
from ddqcli.training import distributed
from ddqcli.training.distillation import matched, rows_of_scores, scale_of
from ddqcli.training.divergence import require_finite_batch
from ddqcli.training.evaluate import OnProgress


def calibrate(
    quantized: QuantizedModel,
    data: Data,
    batches: int,
    watch: Callable[[float], None],
    teacher: nn.Module | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Fit the input quantizers, and call `watch` with each of `batches` weight gradients in place.

    The argument of `watch` is the share of the batch that this rank has averaged over. A smaller
    share multiplies the square of the noise, which is nearly all of a trained model's gradient.

    With a `teacher` (the float model, for runs that need no labels), targets are drawn from its
    outputs, as the Fisher information is defined. The distance from the float model would not do:
    its gradient is zero at the float weights.

    An input that no batch reaches stays float. Raises DataError for a batch that is not finite.
    """
    model = quantized.model
    with _eval_mode(model):
        for number, (x, y) in enumerate(islice(data.train.epoch(0), batches)):
            require_finite_batch(x, number, "training")
            for quantizer in quantized.activations.values():
                quantizer.observe_pass()
            output = call(model, copied(x))
            if teacher is None:
                loss = data.loss(output, y)
            else:
                loss = _drawn_loss(output, call(teacher, x), y, number)
            torch.autograd.backward(loss)
            watch(1 / distributed.shard().count)
            model.zero_grad(set_to_none=True)
            if on_progress:
                on_progress("calibrate", number + 1, min(batches, len(data.train)))
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


def _drawn_loss(output: Tree, target: Tree, labels: Tree, batch: int) -> Tensor:
    """Return the distillation loss of `output` against values drawn around the float output.

    Classes are drawn from the softmax of the float scores, and cross-entropy is the loss. Other
    values are drawn from a normal distribution whose squared error has the Hessian that the
    distance from the float output has.
    """
    losses = []
    draw = generator("calibrate", batch)
    for o, t, axis in matched(output, target, labels):
        if axis is None:
            noise = torch.randn(t.shape, generator=draw).to(t.device)
            drawn = t + noise * (scale_of(t) / 2).sqrt()
            losses.append(nn.functional.mse_loss(o, drawn) / scale_of(t))
        else:
            probabilities = rows_of_scores(t.detach(), axis).softmax(-1).cpu()
            classes = torch.multinomial(probabilities, 1, generator=draw)[:, 0].to(o.device)
            losses.append(nn.functional.cross_entropy(rows_of_scores(o, axis), classes))
    return torch.stack(losses).sum()
