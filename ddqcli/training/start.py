"""The start of a run: the quantized model, or a compensated one if held-out samples prefer it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from ddqcli.data.load import Data
from ddqcli.training import distributed
from ddqcli.training.compensate import SAMPLES, Compensation
from ddqcli.training.held_out import is_better
from ddqcli.training.trainer import Trainer

_BATCHES = 12  # one pass without gradients takes no more memory for so many than a training step
_PARTS = ((True, True), (False, False))  # means and variances of channels corrected as well, or not


@torch.no_grad()
def choose_start(
    trainer: Trainer, teacher: nn.Module | None, evaluate: Callable[[], float]
) -> None:
    """Set the trainer's model to the best start, and add the first of the trainer's looks.

    The quantized model as it is gives way to a compensated one if that has a lower loss on held-out
    training samples, and no lower accuracy. Bits are then allocated by the error that compensation
    leaves. If correcting the channels' statistics does not help, the weights alone are tried.

    Args:
        trainer: at its first step; `trainer.stages` gets the accuracy of the starts.
        teacher: the float model; without it there is nothing to compensate for.
        evaluate: returns the model's accuracy on the evaluation data.
    """
    model, gates = trainer.model, trainer.gates
    plain = trainer.held_out.look(model, 0)
    trainer.stages = {"quantized": evaluate()}
    if trainer.recipe.train.compensate and teacher is not None:
        plain_model, plain_gates = copy.deepcopy(model.state_dict()), gates.state()
        compensation = Compensation(trainer.quantized, teacher, _samples(trainer.data))
        # Each rank compensates on its own shard; the first one's results count.
        gates.fisher.error_share = distributed.broadcast(compensation.error_shares())
        gates.start()
        allocated_model = copy.deepcopy(model.state_dict())
        for means, variances in _PARTS:
            trainer.load_model(allocated_model)
            compensation.apply(means=means, variances=variances)
            if distributed.shard().count > 1:
                trainer.load_model(distributed.broadcast(model.state_dict()))
            if is_better(trainer.held_out.look(model, 0), plain, plain):
                trainer.stages["compensated"] = evaluate()
                break
        else:
            trainer.load_model(plain_model)
            gates.load_state(plain_gates)
    trainer.look()


def _samples(data: Data) -> Tensor:
    """Return at most SAMPLES training inputs of one shape, as training sees them."""
    inputs: list[Tensor] = []
    for x, _ in islice(data.train.epoch(0), _BATCHES):
        if not inputs or x.shape[1:] == inputs[0].shape[1:]:
            inputs.append(x.clone())  # a loader may fill the same memory again
        if sum(map(len, inputs)) >= SAMPLES:
            break
    return torch.cat(inputs)[:SAMPLES]
