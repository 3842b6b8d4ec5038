"""A loaded model as a graph of int8 operators, each value between them on a grid of its own.

torch.export gives the operators. A layer with quantized weights and inputs becomes integers, and
each operator that the runtimes know in integers gets a quantizer after it. The others compute in
float between a dequantizer and a quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.data.trees import Tree, take_tensors_alone
from ddqcli.errors import UsageError
from ddqcli.onnx.refusal import active_layers, refusal
from ddqcli.pt2e.grids import DEQUANTIZE, QUANTIZE, Grid, Quantizers, Ranges
from ddqcli.pt2e.integers import Symmetric
from ddqcli.pt2e.layers import with_integers
from ddqcli.pt2e.quiet import quiet
from ddqcli.qat.input_hooks import input_quantizer
from ddqcli.qat.network_copy import copy_network
from ddqcli.quant.frozen_input import FrozenInputQuantizer


@dataclass(frozen=True)
class Int8Model:
    """A graph of one sample at a time, and what is in it."""

    module: fx.GraphModule  # takes tensors, and returns a tuple of tensors
    example: tuple[Tensor, ...]  # inputs of one sample
    weights: dict[str, Symmetric]  # by the name of the tensor
    floats: tuple[str, ...]  # quantized weights that no integer layer reads

    @property
    def steps(self) -> list[float | None]:
        """Step of the grid of each output; None for one in float."""
        (outputs,) = next(reversed(self.module.graph.nodes)).args
        return [value.args[1] if value.target is DEQUANTIZE else None for value in outputs]


def one_by_one(inputs: Tree, runtime: str) -> list[tuple[Tensor, ...]]:
    """Return the samples of a tensor [B, ...], or of a tuple of them, as arguments [1, ...].

    Raises UsageError for any other tree.
    """
    positional = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not all(isinstance(x, Tensor) and x.ndim for x in positional):
        raise UsageError(f"{runtime} takes a network of tensors alone, or of a tuple of them.")
    arrays = [plain_strides(x.cpu()) for x in positional]
    return [tuple(x[k : k + 1] for x in arrays) for k in range(len(arrays[0]))]


def plain_strides(x: Tensor) -> Tensor:
    """Return a contiguous tensor whose strides say so, which ExecuTorch reads.

    PyTorch leaves others along axes of length 1, such as those of gray images in channels_last.
    """
    return x.reshape(-1).view(x.shape)


def require_int8_inputs(model: nn.Module, runtime: str) -> None:
    """Raise UsageError unless layers read inputs of 8 bits, the only ones that int8 holds."""
    quantizers = [
        (name, quantizer)
        for name, module in model.named_modules()
        if isinstance(quantizer := input_quantizer(module), FrozenInputQuantizer)
    ]
    if not quantizers:
        raise UsageError(
            f"{runtime} computes in integers, and the inputs of this run's layers are float; "
            "finetune with --act-bits 8."
        )
    for name, quantizer in quantizers:
        if not quantizer.uniform or quantizer.bits != 8:
            raise UsageError(
                f"{runtime} has inputs of 8 bits alone, and {name} has {quantizer.bits}; finetune "
                "with --act-bits 8."
            )


def make_int8(
    model: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    samples: Sequence[tuple[Tensor, ...]],
    runtime: str,
) -> Int8Model:
    """Return a model as an int8 graph.

    Args:
        model: the network as `ddqcli.load` returns it, its inputs at 8 bits.
        weights: its quantized tensors under all of their names.
        samples: inputs [1, ...]; grids that were not trained cover the values that they give.
        runtime: the name for messages.

    Raises UsageError for a network that torch.export cannot trace, or without integer layers.
    """
    require_int8_inputs(model, runtime)
    model = copy_network(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in model.modules():
        if isinstance(quantizer := input_quantizer(module), FrozenInputQuantizer):
            module.register_module("input_quantizer", _Int8Input(quantizer))
    with torch.no_grad():
        module = _traced(model, samples[0], runtime)
        layers = with_integers(module, weights)
        if not layers:
            raise UsageError(f"{runtime} has no integers for any quantized layer of the model.")
        ranges = Ranges(module)
        for sample in samples:
            ranges.run(*sample)
    Quantizers(module.graph, set(layers), ranges.found).add()
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    stored = {layer.name: layer.value for layer in layers.values()}
    names = {tensor.name for tensor in weights.values() if len(tensor.shape) > 1}
    return Int8Model(module, samples[0], stored, tuple(sorted(names - stored.keys())))


def _traced(model: nn.Module, sample: tuple[Tensor, ...], runtime: str) -> fx.GraphModule:
    """Return the graph of a copy of a model, whose forward is replaced."""
    with quiet(), active_layers(model) as active:
        take_tensors_alone(model, sample)
        try:
            program = torch.export.export(model, sample).run_decompositions({})
        except Exception as error:
            raise UsageError(refusal(error, active, runtime)) from error
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())  # flat inputs and outputs
    return module


class _Int8Input(nn.Module):
    """A FrozenInputQuantizer of 8 bits as the two operators that runtimes know."""

    observing = False

    def __init__(self, frozen: FrozenInputQuantizer) -> None:
        super().__init__()
        self.grid = Grid(float(frozen.scale), frozen.zero_point - 128)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = DEQUANTIZE(QUANTIZE(x, *self.grid.arguments), *self.grid.arguments)
        return value
