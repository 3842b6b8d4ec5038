"""The start of a run: the quantized model, or a compensated one if held-out samples prefer it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice

import torch
from torch import nn

from ddqcli.data.load import Data
from ddqcli.data.trees import Tree, concatenated, copied, shared_length, sliced, tensors
from ddqcli.runs.evaluation import Metric
from ddqcli.training import distributed
from ddqcli.training.compensate import SAMPLES, Compensation
from ddqcli.training.evaluate import OnProgress
from ddqcli.training.held_out import HeldOut, is_better
from ddqcli.training.metrics import Look
from ddqcli.training.trainer import Trainer

_BATCHES = 12  # one pass without gradients takes no more memory for so many than a training step
_PARTS = ((True, True), (False, False))  # means and variances of channels corrected as well, or not


@torch.no_grad()
def choose_start(
    trainer: Trainer,
    float_model: nn.Module | None,
    evaluate: Callable[[], float],
    on_progress: OnProgress | None = None,
) -> None:
    """Set the trainer's model to the best start, and add the first of the trainer's looks.

    The quantized model as it is gives way to a compensated one if that has a lower loss on held-out
    training samples and no worse metric, or a clearly lower loss and a metric that is worse by
    chance. Bits are then allocated by the error that compensation leaves. If correcting the
    channels' statistics does not help, the weights alone are tried.

    Args:
        trainer: at its first step; `trainer.stages` gets the metric of the starts.
        float_model: without it there is nothing to compensate for.
        evaluate: returns the model's metric on the evaluation data.
        on_progress: told the layers that compensation has visited.
    """
    model, gates = trainer.model, trainer.gates
    plain = trainer.held_out.look(model, 0)
    trainer.stages = {"quantized": evaluate()}
    if trainer.recipe.train.compensate and float_model is not None:
        plain_model, plain_gates = copy.deepcopy(model.state_dict()), gates.state()
        samples = _samples(trainer.data)
        compensation = Compensation(trainer.quantized, float_model, samples, on_progress)
        # Each rank compensates on its own shard; the first one's results count.
        gates.fisher.error_share = distributed.broadcast(compensation.error_shares())
        gates.start()
        allocated_model = copy.deepcopy(model.state_dict())
        for means, variances in _PARTS:
            trainer.load_model(allocated_model)
            compensation.apply(means=means, variances=variances)
            if distributed.shard().count > 1:
                trainer.load_model(distributed.broadcast(model.state_dict()))
            look = trainer.held_out.look(model, 0)
            if _is_preferred(look, plain, trainer.held_out, trainer.data.judged_by):
                trainer.stages["compensated"] = evaluate()
                break
        else:
            trainer.load_model(plain_model)
            gates.load_state(plain_gates)
    trainer.look()


def _is_preferred(look: Look, plain: Look, held_out: HeldOut, metric: Metric) -> bool:
    """True if a start is better than the plain one.

    Where its loss is lower by more than chance, its metric may be worse by chance.
    """
    clearly = held_out.least_gain, held_out.chance_points
    return any(is_better(look, plain, plain, metric, *limits) for limits in ((0.0, 0.0), clearly))


def _samples(data: Data) -> Tree:
    """Return at most SAMPLES training inputs of one shape, as training sees them.

    Inputs that differ in their first dimension cannot be put together: of those, one batch.
    """
    inputs: list[Tree] = []
    for x, _ in islice(data.train.epoch(0), _BATCHES):
        if not inputs or _shapes(x) == _shapes(inputs[0]):
            inputs.append(copied(x))  # a loader may fill the same memory again
        if sum(shared_length(each) or SAMPLES for each in inputs) >= SAMPLES:
            break
    if any(shared_length(each) is None for each in inputs):
        return inputs[0]
    return sliced(concatenated(inputs), slice(SAMPLES))


def _shapes(inputs: Tree) -> list[torch.Size]:
    """Return the shapes of a sample's tensors."""
    return [x.shape[1:] for x in tensors(inputs)]
