"""The start of a run: the best of the quantized model and compensated ones."""

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


@torch.no_grad()
def choose_start(
    trainer: Trainer, teacher: nn.Module | None, evaluate: Callable[[], float]
) -> None:
    """Set the trainer's model to the best start, and look at it.

    The starts are the quantized model as it is, and compensated ones with and without corrected
    channel statistics: each is kept only if the loss on held-out training samples falls and their
    accuracy does not. `evaluate` measures the accuracy of the stages on the evaluation data.
    """
    quantized, model = trainer.quantized, trainer.model
    plain = best = trainer.held_out.look(model, 0)
    trainer.stages = {"quantized": evaluate()}
    state = plain_state = copy.deepcopy(model.state_dict())
    if trainer.recipe.train.compensate and teacher is not None:
        compensation = Compensation(quantized, teacher, _samples(trainer.data))
        for means, variances in ((True, True), (True, False), (False, False)):
            model.load_state_dict(plain_state)
            compensation.apply(means=means, variances=variances)
            if distributed.shard().count > 1:  # each rank has compensated on its own shard
                model.load_state_dict(distributed.broadcast(model.state_dict()))
            look = trainer.held_out.look(model, 0)
            if is_better(look, best, plain):
                best, state = look, copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        if best is not plain:
            trainer.stages["compensated"] = evaluate()
    trainer.look()


def _samples(data: Data) -> Tensor:
    """Return about SAMPLES training inputs, as training sees them, at most four batches."""
    inputs: list[Tensor] = []
    for x, _ in islice(data.train.epoch(0), 4):
        inputs.append(x)
        if sum(map(len, inputs)) >= SAMPLES:
            break
    return torch.cat(inputs)[:SAMPLES]
