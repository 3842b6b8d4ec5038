"""Weights assigned with compensated errors, and corrected channel statistics, before training.

Most of what training gains can be had before the first step. One pass over some training samples
goes through the layers in forward order. Each weight is put on the levels of its own table so that
the layer's output stays near the float layer's (`quant.compensation`), on the inputs that the
quantized network really gives it. What remains of the difference in a channel's mean goes into
the bias, or into the running mean of the BatchNorm that follows. Bits, levels and bytes stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddqcli.qat.layer_matrix import as_matrix, channels, from_matrix, patches
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.quant.compensation import compensated
from ddqcli.quant.quantizer import DDQuantizer

SAMPLES = 192
_PATCHES = 10_000  # most of a layer's input patches that its statistics are taken from
_PATCHES_PER_INPUT = 32  # fewer do for a small layer: so many for each of its inputs,
_FEWEST_PATCHES = 1_000  # and at least these
_PULL = 0.5  # of the way to the least-squares fit of the float layer's outputs
_INSIDE = 0.15  # of the way from a cell's border to its level
_MOST_VARIANCE = 4.0  # factor by which a BatchNorm's variance is corrected


@dataclass
class FloatStatistics:
    """What the float network gives for the samples, by layer name."""

    outputs: dict[str, Tensor] = field(default_factory=dict)  # [G, O, P], of sampled patches
    means: dict[str, Tensor] = field(default_factory=dict)  # [C]: BatchNorm inputs, biased outputs
    variances: dict[str, Tensor] = field(default_factory=dict)  # [C]: BatchNorm inputs


class Compensation:
    """Improves the weights, biases and BatchNorm statistics of a quantized model in one pass.

    Args:
        quantized: the model at its first bits; its parameters hold the float weights.
        teacher: the float model.
        x: training inputs [N, ...], drawn at random.
    """

    def __init__(self, quantized: QuantizedModel, teacher: nn.Module, x: Tensor) -> None:
        self.quantized, self.x = quantized, x
        self.layers = _weight_layers(quantized)
        self.statistics = _float_statistics(teacher, self.layers, x)

    @torch.no_grad()
    def apply(self, *, means: bool, variances: bool) -> None:
        """Assign the weights of every layer that the samples reach.

        `means` corrects the mean of every channel, `variances` BatchNorm's variance as well.
        """
        model = self.quantized.model.eval()
        with _hooks() as add:
            for name, tensor in self.layers.items():
                layer = model.get_submodule(name)
                add(layer.register_forward_pre_hook(self._assign(name, tensor), with_kwargs=True))
            if means:
                for name, module in model.named_modules():
                    if name in self.statistics.variances:
                        add(module.register_forward_pre_hook(self._correct_norm(name, variances)))
                    elif name in self.statistics.means:
                        add(module.register_forward_hook(self._correct_bias(name)))
            model(self.x.clone())

    def _assign(self, name: str, tensor: QuantizedParameter) -> Callable[..., None]:
        """Return a hook that assigns a layer's weight when its input is there."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outputs = self.statistics.outputs.get(name)
            if outputs is None or not _first_call(hook):
                return
            inputs = patches(layer, _input(args, kwargs).float(), _patch_count(layer, tensor))
            if inputs.shape[2] != outputs.shape[2]:
                return
            weight = as_matrix(layer, tensor.parameter)
            hessian = inputs @ inputs.transpose(1, 2) / inputs.shape[2]
            residual = outputs - weight @ inputs
            pull = _PULL * residual @ inputs.transpose(1, 2) / inputs.shape[2]
            assigned = compensated(weight, level_values(layer, tensor), hessian, pull)
            levels = from_matrix(layer, assigned, tensor.parameter.shape)
            tensor.parameter.copy_(inside_cells(tensor.quantizer, tensor.parameter, levels))

        return hook

    def _correct_norm(self, name: str, variances: bool) -> Callable[..., None]:
        """Return a hook that moves a BatchNorm's statistics by what its input has moved."""

        def hook(norm: Any, args: tuple[Tensor, ...]) -> None:
            if not _first_call(hook):
                return
            values = channels(args[0].float(), _PATCHES)
            norm.running_mean += values.mean(1) - self.statistics.means[name]
            if variances:
                ratio = values.var(1) / self.statistics.variances[name]
                ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                norm.running_var *= ratio.clamp(1 / _MOST_VARIANCE, _MOST_VARIANCE)

        return hook

    def _correct_bias(self, name: str) -> Callable[..., Tensor]:
        """Return a hook that moves a layer's bias by what its output lacks."""
        biases = {t.name: t for t in self.quantized.tensors if t.kind == "bias"}

        def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not _first_call(hook):
                return output
            before = layer.bias.detach().clone()
            lacks = self.statistics.means[name] - _channel_means(layer, output)
            if tensor := biases.get(f"{name}.bias"):
                tensor.parameter.add_(lacks)
                tensor.quantizer.fit(tensor.parameter, tensor.quantizer.bits)
            else:
                layer.bias.add_(lacks)
            moved: Tensor = layer.bias.detach() - before
            return output + moved.view(-1, *[1] * (output.ndim - 1 - _channel_axis(layer, output)))

        return hook


def level_values(layer: nn.Module, tensor: QuantizedParameter) -> Tensor:
    """Return the levels in force as values: [n], or [G, O, n] with one table a channel."""
    levels, scale, zero_point = tensor.quantizer.effective_levels()
    most = max(map(len, levels))
    table = torch.stack([torch.cat([row, row[-1:].expand(most - len(row))]) for row in levels])
    values = (table - zero_point[:, None]) * scale[:, None]
    if len(values) == 1:
        return values[0]
    groups = getattr(layer, "groups", 1)
    if tensor.quantizer.axis == 1:  # of transposed convolutions: the outputs of one group
        return values[None].expand(groups, -1, -1)
    return values.view(groups, -1, most)


def inside_cells(quantizer: DDQuantizer, weight: Tensor, levels: Tensor) -> Tensor:
    """Return `weight` moved just inside the cells of `levels`, to which it is then quantized.

    A weight that is there already stays. So a long training still starts from what the float
    weights knew, and the quantized weights are the assigned ones.
    """
    moved = weight.detach().clone()
    away = quantizer(moved) != levels
    if not bool(away.any()):
        return moved
    low, high = _cell_borders(quantizer, levels)
    nearest = moved.clamp(low + _INSIDE * (levels - low), high - _INSIDE * (high - levels))
    moved[away] = nearest[away]
    still_away = quantizer(moved) != levels  # of levels so near each other that cells have no width
    moved[still_away] = levels[still_away]
    return moved


def _cell_borders(quantizer: DDQuantizer, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the borders of the cells that `levels`, shaped as the weight, stand for."""
    rows, scale, zero_point = quantizer.effective_levels()
    low, high = torch.empty_like(levels), torch.empty_like(levels)
    by_group = [t.movedim(quantizer.axis, 0) for t in (levels, low, high)]
    if len(rows) == 1:
        by_group = [t[None] for t in (levels, low, high)]
    for g, (group, group_low, group_high) in enumerate(zip(*by_group, strict=True)):
        values = torch.tensor(sorted(set(((rows[g] - zero_point[g]) * scale[g]).tolist())))
        borders = (values[1:] + values[:-1]) / 2
        index = torch.searchsorted(values, group.cpu().contiguous())
        group_low.copy_(torch.cat([values[:1], borders])[index])
        group_high.copy_(torch.cat([borders, values[-1:]])[index])
    return low, high


def _weight_layers(quantized: QuantizedModel) -> dict[str, QuantizedParameter]:
    """Return the weights that compensation can assign, by their layer's name."""
    layers = {}
    for tensor in quantized.tensors:
        place = tensor.places[0]
        if tensor.kind == "bias" or isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if tensor.parameter.ndim >= 2 and place.local in ("weight", "in_proj_weight"):
            layers[place.layer] = tensor
    return layers


@torch.no_grad()
def _float_statistics(
    teacher: nn.Module, layers: dict[str, QuantizedParameter], x: Tensor
) -> FloatStatistics:
    """Run the float model on x, and keep what the quantized one will be compared with."""
    found = FloatStatistics()

    def outputs(name: str, tensor: QuantizedParameter) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            source = _input(args, kwargs)
            if name not in found.outputs and source is not None:
                inputs = patches(layer, source.float(), _patch_count(layer, tensor))
                weight: Any = getattr(layer, tensor.places[0].local)
                found.outputs[name] = as_matrix(layer, weight.float()) @ inputs

        return hook

    def norm_inputs(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in found.means and args:
                values = channels(args[0].float(), _PATCHES)
                found.means[name], found.variances[name] = values.mean(1), values.var(1)

        return hook

    def biased_outputs(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.means.setdefault(name, _channel_means(layer, output))

        return hook

    with _hooks() as add:
        for name, tensor in layers.items():
            hook = outputs(name, tensor)
            add(teacher.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in teacher.named_modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                add(module.register_forward_pre_hook(norm_inputs(name)))
            elif name in layers and isinstance(getattr(module, "bias", None), Tensor):
                add(module.register_forward_hook(biased_outputs(name)))
        teacher.eval()(x.clone())
    return found


@contextmanager
def _hooks() -> Iterator[Callable[[RemovableHandle], None]]:
    """Collect hooks, and remove them at the end."""
    handles: list[RemovableHandle] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def _first_call(hook: Any) -> bool:
    """True the first time: a layer that is called again keeps what its first call decided."""
    called = getattr(hook, "called", False)
    hook.called = True
    return not called


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a layer's input; None for attention between different tensors."""
    if {"query", "key", "value"} <= kwargs.keys() or len(args) >= 3:
        names = ("query", "key", "value")
        query, key, value = args[:3] if len(args) >= 3 else (kwargs[name] for name in names)
        return query if query is key and key is value else None
    x = args[0] if args else next(iter(kwargs.values()), None)
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def _patch_count(layer: nn.Module, tensor: QuantizedParameter) -> int:
    inputs = as_matrix(layer, tensor.parameter).shape[2]
    return min(_PATCHES, max(_FEWEST_PATCHES, _PATCHES_PER_INPUT * inputs))


def _channel_axis(layer: nn.Module, output: Tensor) -> int:
    return 1 if isinstance(layer, nn.modules.conv._ConvNd) else output.ndim - 1


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the mean output [C] of each channel."""
    axis = _channel_axis(layer, output)
    return output.detach().float().transpose(axis, -1).flatten(0, -2).mean(0)
