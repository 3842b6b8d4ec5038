"""Behavior of a network in training that quantizers must know of, from a trial on a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ddqcli.data.load import Data
from ddqcli.data.ready_batches import ReadyBatches
from ddqcli.data.seeding import seeded
from ddqcli.data.trees import Tree, call, copied, shared_length, sliced, tensors
from ddqcli.errors import DataError, UsageError
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.network_copy import copy_network

_SAMPLES = 8
_LARGER = 100.0  # factor on weights, so that any limit on their size takes effect
_REENTRANT = "CheckpointFunctionBackward"  # in the graph of a part under torch's checkpoint


def refuse_scripted_parts(model: nn.Module) -> None:
    """Raise UsageError, naming the layer, for parts that torch.jit has compiled.

    Their weights can neither be quantized nor trained in a copy of the network.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            raise UsageError(
                f"{name or 'The network'} is compiled by torch.jit, so its weights cannot be "
                "quantized; build it as a plain module, without torch.jit.script or trace."
            )


def refuse_written_weights(quantized: QuantizedModel, teacher: nn.Module, data: Data) -> None:
    """Raise UsageError, naming the layer, if the network's forward writes a weight to quantize.

    The layer would write what its quantizer returns, and not the weight behind it.
    """
    trial = copy_network(teacher).train()
    parameters = {name: p.data for name, p in trial.named_parameters(remove_duplicate=False)}
    before = {}
    for tensor in quantized.tensors:
        if tensor.name in parameters:
            parameters[tensor.name].mul_(_LARGER)
            before[tensor.name] = parameters[tensor.name].clone()
    with suppress(Exception), torch.no_grad():  # so large weights may be too much for it
        call(trial, few_inputs(data))
    after = dict(trial.named_parameters(remove_duplicate=False))
    for tensor in quantized.tensors:
        name = tensor.name
        if name in before and not torch.equal(after[name].data, before[name]):
            place = tensor.places[0]
            kind = type(trial.get_submodule(place.layer)).__name__
            raise UsageError(
                f"The forward of {place.layer or 'the network'} ({kind}) writes its own {name}, "
                "which would not be what its quantizer stores; keep the layer in float: --set "
                f"'overrides=[{{match: \"{name}\", skip: true}}]'."
            )


@torch.no_grad()
def written_buffers(model: nn.Module, inputs: Tree) -> list[str]:
    """Return the names of the buffers that a forward pass changes in eval mode."""
    trial = copy_network(model).eval()
    before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    call(trial, copied(inputs))
    after = dict(trial.named_buffers())
    return [n for n, b in before.items() if n in after and not torch.equal(after[n].to(b), b)]


@torch.no_grad()
def draws_numbers(model: nn.Module, inputs: Tree) -> bool:
    """True if a forward pass in eval mode draws random numbers that its output depends on."""
    trial = copy_network(model).eval()
    outputs = []
    for seed in (1, 2):
        with seeded("draws", seed):
            outputs.append(tensors(call(trial, copied(inputs))))
    return not all(map(torch.equal, *outputs))


def refuse_batch_of_one(model: nn.Module, data: Data) -> None:
    """Raise DataError if training ends an epoch with one sample that BatchNorm cannot normalize."""
    train = data.train
    if not isinstance(train, ReadyBatches) or train.last_batch != 1 or len(train) == 1:
        return
    trial = copy_network(model).train()
    try:
        with torch.no_grad():
            call(trial, sliced(few_inputs(data), slice(1)))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "The last training batch of an epoch holds one sample, of which BatchNorm has no "
            "statistics; give the DataLoader drop_last=True, or --set train.batch_norm=held."
        ) from error


def is_reentrant(model: nn.Module, data: Data) -> bool:
    """True if the network recomputes parts in its backward pass by torch's reentrant checkpoint.

    Each recomputation is a backward pass of its own, so nothing can be quantized ahead for all.
    """
    trial = copy_network(model).train()
    with suppress(Exception):
        output = call(trial, few_inputs(data))
        return any(type(node).__name__ == _REENTRANT for node in _graph(output))
    return False


def few_inputs(data: Data) -> Tree:
    """Return the inputs of a few training samples, for a forward pass on trial."""
    inputs, _ = next(iter(data.train.epoch(0)))
    return copied(inputs if shared_length(inputs) is None else sliced(inputs, slice(_SAMPLES)))


def _graph(output: Tree) -> Iterator[Any]:
    """Yield the nodes of the autograd graph behind the tensors of an output."""
    seen: set[Any] = set()
    stack = [x.grad_fn for x in tensors(output)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions]
