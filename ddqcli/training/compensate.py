"""Compensated weights and corrected channel statistics: a better model before the first step.

One pass over some training samples visits the layers in forward order. Each weight is rounded to
the levels of its own table so that the layer's output stays near the float layer's
(`quant.compensation`), on the inputs that the layer has in the quantized network. What the mean of
an output channel still lacks then goes into the bias, or into the running mean of the BatchNorm
that follows. Levels, bit-widths and bytes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.trees import Tree
from ddqcli.qat.layer_config import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, weight_names
from ddqcli.qat.layer_matrix import as_matrix, channel_values, from_matrix, patches, row_levels
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.qat.norms import keeps_statistics
from ddqcli.quant.cells import inside_cells, level_values
from ddqcli.quant.compensation import compensated_rounding, error_share
from ddqcli.training.evaluate import OnProgress
from ddqcli.training.first_calls import FirstCalls

SAMPLES = 192
_MOST_PATCHES = 10_000  # that a layer's statistics are taken from
_PATCHES_PER_INPUT = 32  # are enough for a layer of few inputs,
_FEWEST_PATCHES = 1_000  # with at least these
_MOST_OUTPUTS = 2**28  # values of float outputs that are kept, 1 GiB
_MOST_INPUTS = 10_000  # of a layer: time and memory grow with their square
_PULL = 0.5  # of the way to the least-squares fit of the float layer's outputs
_MOST_VARIANCE = 4.0  # factor by which a BatchNorm's variance is corrected


@dataclass
class _FloatStatistics:
    """Results of the float network for the samples, by layer name."""

    outputs: dict[str, Tensor] = field(default_factory=dict)  # [G, O, P] of patches, without bias
    error_shares: dict[str, float] = field(default_factory=dict)  # that compensation leaves
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # inputs: mean, variance
    biased: dict[str, Tensor] = field(default_factory=dict)  # mean output [C] of layers with bias


class Compensation:
    """Improves the weights, biases and BatchNorm statistics of a quantized model in one pass.

    A layer that the samples do not reach, or whose input is not one tensor, stays as it is. Where a
    weight is read several times, by one layer or by several, the first call of its first layer
    decides.

    Args:
        quantized: at its first bits; its parameters hold float weights.
        teacher: the float model.
        x: training inputs, a tree of tensors [N, ...], drawn at random.
        on_progress: told the layers visited, once in the float network and once in the quantized.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        teacher: nn.Module,
        x: Tree,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.quantized, self.x, self.on_progress = quantized, x, on_progress
        self.layers = _weight_layers(quantized)
        self.patch_counts = _patch_counts(self.layers)
        self.biases = {
            place.layer: tensor
            for tensor in quantized.tensors
            for place in tensor.places
            if place.local == "bias"
        }
        self._visited = 0
        self.float = self._float_statistics(teacher)

    def error_shares(self) -> dict[str, float]:
        """Return the share of each weight's rounding error that compensation leaves, by tensor."""
        return {self.layers[name].name: share for name, share in self.float.error_shares.items()}

    @torch.no_grad()
    def apply(self, *, means: bool, variances: bool) -> None:
        """Assign the weights. Leaves the model in eval mode.

        `means` corrects the mean of every channel, `variances` BatchNorm's variance as well.
        """
        self._visited = len(self.patch_counts)
        with FirstCalls(self.quantized.model.eval(), self.x) as calls:
            for name in self.float.outputs:
                calls.on_input(name, partial(self._assign, name))
            for name in self.float.norms if means else ():
                calls.on_input(name, partial(self._correct_norm, name, variances))
            for name in self.float.biased if means else ():
                calls.on_output(name, partial(self._correct_bias, name))
            calls.run()

    def _assign(self, name: str, x: Tensor) -> None:
        """Assign a layer's weight, given the layer's input."""
        tensor, outputs = self.layers[name], self.float.outputs[name]
        layer, quantizer = tensor.places[0].module, tensor.quantizer
        inputs = patches(layer, x.float(), self.patch_counts[name])
        weight = as_matrix(layer, tensor.parameter)
        residual = outputs - weight @ inputs  # fails if a network's shapes depend on its values
        hessian, correlation = ((y @ inputs.mT) / inputs.shape[2] for y in (inputs, residual))
        levels = row_levels(layer, level_values(quantizer), quantizer.axis)
        rounded = compensated_rounding(weight, levels, hessian, _PULL * correlation)
        assigned = from_matrix(layer, rounded, tensor.parameter.shape)
        tensor.parameter.copy_(inside_cells(quantizer, tensor.parameter, assigned))
        self._advance()

    def _advance(self) -> None:
        """Tell that one more layer was visited."""
        self._visited += 1
        if self.on_progress:
            self.on_progress("compensate", self._visited, 2 * len(self.patch_counts))

    def _correct_norm(self, name: str, variances: bool, x: Tensor) -> None:
        """Move the statistics of a BatchNorm by what its input has moved."""
        norm: Any = self.quantized.model.get_submodule(name)
        mean, variance = _channel_statistics(x)
        float_mean, float_variance = self.float.norms[name]
        norm.running_mean += _finite(mean - float_mean, 0.0)
        if variances:
            ratio = variance / float_variance
            ratio = _finite(torch.where(ratio > 0, ratio, 1.0), 1.0)
            norm.running_var *= ratio.clamp(1 / _MOST_VARIANCE, _MOST_VARIANCE)

    def _correct_bias(self, name: str, output: Tensor) -> Tensor:
        """Move a layer's bias by what its output lacks. Return the output with the new bias."""
        layer: Any = self.quantized.model.get_submodule(name)
        before = layer.bias.clone()
        lack = _finite(self.float.biased[name] - _channel_means(layer, output), 0.0)
        if tensor := self.biases.get(name):
            tensor.parameter.copy_(before + lack)
            tensor.quantizer.fit(tensor.parameter, tensor.quantizer.bits)
        else:
            layer.bias.copy_(before + lack)
        change: Tensor = layer.bias - before
        moved = output + change.view(-1, *[1] * _axes_after_channels(layer))
        return moved.to(output.dtype)

    @torch.no_grad()
    def _float_statistics(self, teacher: nn.Module) -> _FloatStatistics:
        """Return what the float network computes for the samples."""
        statistics = _FloatStatistics()

        def keep_output(name: str, layer: nn.Module, x: Tensor) -> None:
            inputs = patches(layer, x.float(), self.patch_counts[name])
            weight = getattr(layer, self.layers[name].places[0].local)
            statistics.outputs[name] = as_matrix(layer, weight.float()) @ inputs
            statistics.error_shares[name] = error_share(inputs @ inputs.mT / inputs.shape[2])
            self._advance()

        def keep_statistics(name: str, x: Tensor) -> None:
            statistics.norms[name] = _channel_statistics(x)

        def keep_means(name: str, layer: nn.Module, output: Tensor) -> None:
            statistics.biased[name] = _channel_means(layer, output)

        with FirstCalls(teacher.eval(), self.x) as calls:
            for name, module in teacher.named_modules():
                if name in self.patch_counts:
                    calls.on_input(name, partial(keep_output, name, module))
                if keeps_statistics(module):
                    calls.on_input(name, partial(keep_statistics, name))
                elif name in self.layers and isinstance(getattr(module, "bias", None), Tensor):
                    calls.on_output(name, partial(keep_means, name, module))
            calls.run()
        return statistics


def _weight_layers(quantized: QuantizedModel) -> dict[str, QuantizedParameter]:
    """Return the weights that are matrices of their layer's one input, by layer name."""
    return {
        tensor.places[0].layer: tensor
        for tensor in quantized.tensors
        if tensor.places[0].local in ("weight", "in_proj_weight")
        and weight_names(tensor.places[0].module)
        and not any(isinstance(place.module, EMBEDDINGS) for place in tensor.places)
    }


def _patch_counts(layers: dict[str, QuantizedParameter]) -> dict[str, int]:
    """Return how many patches to read in each layer whose weight can be assigned."""
    shapes = {n: as_matrix(t.places[0].module, t.parameter).shape for n, t in layers.items()}
    counts = {
        name: min(_MOST_PATCHES, max(_FEWEST_PATCHES, _PATCHES_PER_INPUT * inputs))
        for name, (_, _, inputs) in shapes.items()
        if inputs <= _MOST_INPUTS
    }
    outputs = sum(shapes[name][:2].numel() * count for name, count in counts.items())
    share = min(1.0, _MOST_OUTPUTS / max(1, outputs))
    return {name: int(share * count) for name, count in counts.items()}


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of x [N, C, *L]."""
    values = channel_values(x.float(), _MOST_PATCHES)
    return values.mean(1), values.var(1, correction=0)


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the mean output [C] of each channel."""
    last = output.float().movedim(-1 - _axes_after_channels(layer), -1)
    return last.reshape(-1, last.shape[-1]).mean(0)


def _axes_after_channels(layer: nn.Module) -> int:
    return len(layer.kernel_size) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 0


def _finite(x: Tensor, otherwise: float) -> Tensor:
    return torch.where(x.isfinite(), x, otherwise)
