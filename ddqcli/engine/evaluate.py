"""Passes over data that change no weight: accuracy, BatchNorm statistics, what activations and gradients look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddqcli.engine import distributed
from ddqcli.engine.augment import generator
from ddqcli.engine.convert import Converted
from ddqcli.engine.data import Batches, Data
from ddqcli.errors import DataError
from ddqcli.recipe import DataSection

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PROBE = 8  # samples
_ENOUGH = 512  # samples, for means
_NEARLY = 0.95  # of 512 images the quickstart's model reads 512 plain and 176 mirrored, a CIFAR ResNet-20 493 and 499
OnProgress = Callable[[str, int, int], None]  # what is going on, done, total


def output_of(result: Any) -> Any:
    """The main output of a model that returns several while training (torchvision's GoogLeNet and Inception)."""
    return result.logits if hasattr(result, "logits") else result


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, *, on_progress: OnProgress | None = None) -> float:
    """Mean of the metric over every held-out sample once, in percent."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for done, (x, y) in enumerate(data.val.epoch(0)):
        if not len(x):
            continue  # a last batch with fewer samples than there are processes
        with parametrize.cached():
            scores = data.metric(output_of(model(x)), y)
        total += scores.double().sum().cpu()
        if on_progress:
            on_progress("evaluate", done + 1, len(data.val))
    return 100 * float(distributed.total(total)) / data.val.samples


@torch.no_grad()
def probe(model: nn.Module, data: Data) -> dict[str, Tensor] | None:
    """The first held-out inputs and what the model makes of them, to compare a loaded one with; None for no tensor."""
    model.eval()
    x = next(iter(data.val.epoch(0)))[0][:_PROBE]
    output = output_of(model(x.clone()))  # a network may change its input in place
    return {"input": x.cpu(), "output": output.cpu()} if isinstance(output, Tensor) else None


def sample_differences(found: Tensor, expected: Tensor) -> Tensor:
    """[B]: root mean square of each sample's difference, as a share of that of all expected values; infinite for NaN."""
    error = (found.double() - expected.double()).flatten(1).square().mean(1).sqrt()
    return (error / expected.double().square().mean().sqrt()).nan_to_num(nan=torch.inf) * (error != 0)


def batch_norms(model: nn.Module) -> list[Any]:
    """The BatchNorm layers that keep statistics, and in training change them: a network may hold its own fixed."""
    return [m for m in model.modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats and m.training]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set BatchNorm's running statistics to the plain mean over `batches`, if any, with the weights as they now are.

    A channel that is constant, as one whose weights all take the level 0, gets the mean variance of its layer's others: its
    output stays, and one step of that level, if training goes on, is not blown up by 1 / sqrt(0 + eps).
    """
    model.train()
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    varies: dict[Any, Tensor] = {}

    def look(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values()))).transpose(0, 1).flatten(1)
        varies[norm] = varies.get(norm, False) | (x.amax(1) > x.amin(1))

    hooks = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain mean; what no batch reaches keeps its statistics
        norm.num_batches_tracked.zero_()
    for x, _ in batches if norms else ():
        model(x)
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(distributed.total(statistic.clone()) / distributed.shard().count)
    for norm, varied in varies.items():
        live = distributed.total(varied.float()) > 0
        norm.running_var[~live] = norm.running_var[live].mean() if live.any() else 1.0
    model.eval()


def trained_augmentation(model: nn.Module, data: Data, section: DataSection, *, labels: bool) -> dict[str, Any]:
    """Let `fill` and `flip` of `data.augment` be as the model was trained, where `section` leaves them to it; what it tells."""
    found: dict[str, Any] = {}
    if data.augment and section.fill == "auto" and (fill := nearest_fill(model, data)):
        found["fill"] = data.augment.fill = fill
    if data.augment and section.flip == "auto":
        found["flip"] = data.augment.flip = reads_mirrored(model, data, labels=labels)
    return found


@torch.no_grad()
def reads_mirrored(model: nn.Module, data: Data, *, labels: bool = True) -> bool:
    """Whether `model` knows mirrored images: of some hundred in training it has right nearly as many as of the plain ones.

    Without `labels`, right is what it makes of the plain one.
    """
    right = torch.zeros(2, dtype=torch.float64)
    for x, y in _some(data.train):
        mirrored = x.flip(-1)  # first, since a network may change its input in place
        plain = output_of(model(x))
        for number, output in enumerate((plain, output_of(model(mirrored)))):
            right[number] += data.metric(output, y if labels else plain.argmax(-1)).double().sum().cpu()
    return bool(right[1] > _NEARLY * right[0])


def _some(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The first batches, of some hundred samples in all."""
    seen = 0
    for x, y in batches.epoch(0):
        yield x, y
        seen += len(x)
        if seen >= _ENOUGH:
            return


@torch.no_grad()
def nearest_fill(model: nn.Module, data: Data) -> str | None:
    """Which of `Prepare.fills` the images that `model` was trained on were padded with; None if nothing tells.

    With each, the means over some hundred samples are held against BatchNorm's running means, in running deviations.
    """
    augment = data.augment
    norms = [m for m in model.modules() if type(m).forward is nn.BatchNorm2d.forward and m.running_mean is not None]
    if not (augment and augment.pad and norms):
        return None
    means: dict[nn.Module, list[Tensor]] = {}

    def look(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        means.setdefault(norm, []).append(x.float().transpose(0, 1).flatten(1).mean(1))

    def distance(norm: Any) -> float:
        off = torch.stack(means[norm]).mean(0) - norm.running_mean
        return float((off.square() / (norm.running_var + norm.eps)).mean())

    hooks = [norm.register_forward_pre_hook(look, with_kwargs=True) for norm in norms]
    found, in_force = {}, augment.fill
    for fill in augment.fills:
        augment.fill = fill
        means.clear()
        for x, _ in _some(data.train):
            model(x)
        found[fill] = sum(map(distance, means))
    for hook in hooks:
        hook.remove()
    augment.fill = in_force
    nearest = min(found, key=lambda fill: found[fill])
    return nearest if found[nearest] < max(found.values()) else None


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Within: the model is in eval mode, so that looking at it changes no statistics."""
    was = model.training
    model.eval()
    yield
    model.train(was)


def calibrate(
    converted: Converted, data: Data, batches: int, watch: Callable[[float], None], teacher: nn.Module | None = None
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
    with frozen_batch_norm(model):
        for number, (x, y) in enumerate(islice(data.train.epoch(0), batches)):
            if x.is_floating_point() and not x.isfinite().all():
                raise DataError(f"Batch {number} of the training data holds NaN or infinite values; repair the data.")
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
        converted.keep_input(name, "the layer's own forward is never called, so its input is not seen")
