"""Warnings of a finished run, each with its remedy: lost accuracy, divergence, idle parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddqcli.data.batches import batch_size
from ddqcli.data.trees import call, copied, tensors
from ddqcli.qat.budget import kept_bytes, nbytes, stored_bytes
from ddqcli.qat.model import QuantizedParameter
from ddqcli.runs.evaluation import Course
from ddqcli.training import distributed
from ddqcli.training.trainer import Trainer

_BELOW_FLOAT = 0.5  # points, or percent of a metric in another unit: worth more training
_FAR_BELOW_FLOAT = 10.0  # points, or percent of a metric in another unit
_LARGE_FLOAT_SHARE = 0.5  # of the file's bytes
_SMALL_BATCH = 8  # samples, up to which batch statistics are too noisy to normalize by

_UNUSED_SHARE = 0.25  # of a tensor's levels, from which on they are worth a warning
_DISTANT_RANGES = 10.0  # factor: the smaller range has a tenth of the levels
_IDLE_SPREAD = 0.05  # of a probability
_NAMED = 3  # tensors in a warning
_VALUES_PER_LEVEL = 4  # a tensor with fewer cannot be expected to use every level


def find_warnings(
    trainer: Trainer, metrics: list[dict[str, Any]], course: Course | None = None
) -> list[str]:
    """Return one sentence for each problem of the run, with its remedy.

    `metrics` are the run's lines of metrics.jsonl, as StepMetrics has them. Without `course`,
    nothing is said about accuracies.
    """
    warnings = [
        _far_below_float(trainer, course) if course else None,
        _constant_outputs(trainer),
        _divergence(trainer),
        _no_improvement(trainer, course) if course else None,
        _rising_loss(trainer),
        _small_batches(trainer),
        _much_stays_float(trainer),
        _constant_tensors(trainer),
        _zero_inputs(trainer),
        _distant_ranges(trainer),
        _unused_levels(trainer),
        _idle_gates(trainer, metrics),
        _idle_dbps(trainer, metrics),
    ]
    return [warning for warning in warnings if warning]


# ---- accuracy


def _far_below_float(trainer: Trainer, course: Course) -> str | None:
    drop = _drop(trainer, course, _FAR_BELOW_FLOAT)
    if drop is None:
        return None
    recipe = trainer.recipe
    bits = f"a larger budget (now {recipe.budget.target})"
    if recipe.budget.target == "none":
        bits = f"a larger weights.max_bits (now {recipe.weights.max_bits})"
    return (
        f"the quantized model is {trainer.data.judged_by.amount(drop)} worse than the float model; "
        f"take {bits}, more training data, or more train.epochs (now {recipe.train.epochs})"
    )


def _no_improvement(trainer: Trainer, course: Course) -> str | None:
    """Report that the start is delivered, unless it is as good as the float model.

    After two divergences, another warning does.
    """
    if course.delivered == "trained" or not trainer.steps or trainer.gave_up:
        return None
    if _drop(trainer, course, _BELOW_FLOAT) is None:
        return None
    remedy = (
        f"{trainer.data.train.samples:,} training samples may be too few, or train.lr (now "
        f"{trainer.recipe.train.lr:g}) does not fit"
    )
    losses = [look.held_out_loss for look in trainer.best_state.looks]
    start, best = losses[0], min(losses)
    if 0 < start - best < trainer.held_out.least_gain * abs(start):
        return (
            f"training changed the loss on {trainer.held_out.samples:,} held-out samples from "
            f"{start:.3g} to {best:.3g}, which may be chance, so the start is delivered: {remedy}"
        )
    return f"training did not improve the start: {remedy}"


def _drop(trainer: Trainer, course: Course, points: float) -> float | None:
    """Return the metric's drop from the float model, if it is more than `points`."""
    metric, values = trainer.data.judged_by, {s.name: s.accuracy for s in course.stages}
    before = values["float"]
    drop = metric.drop(before, values[course.delivered])
    return drop if drop > metric.tolerance(points, before) else None


@torch.no_grad()
def _constant_outputs(trainer: Trainer) -> str | None:
    """Report a collapse: all held-out samples of a batch get one output, and not from the float."""
    teacher = trainer.held_out.teacher
    batch = next(iter(trainer.data.held_out.epoch(0)), None)
    if teacher is None or batch is None or batch_size(batch) < 2:
        return None
    here, there = (
        [o for o in tensors(call(net.eval(), copied(batch[0]))) if o.ndim and o.is_floating_point()]
        for net in (trainer.model, teacher)
    )
    if not here or not all(bool((o == o[:1]).all()) for o in here):
        return None
    if all(bool((o == o[:1]).all()) for o in there):
        return None
    return (
        f"the outputs are the same for all of {batch_size(batch)} held-out samples: the network "
        f"has collapsed; take a larger budget (now {trainer.recipe.budget.target}) or a smaller "
        f"train.lr (now {trainer.recipe.train.lr:g})"
    )


def _rising_loss(trainer: Trainer) -> str | None:
    """Report a held-out loss that fell, but ended above its first value within the budget.

    After a divergence, another warning names the learning rate.
    """
    seen = trainer.best_state
    start, best, last = seen.start, seen.best, seen.looks[-1]
    if start is None or best is None or best.step == 0 or trainer.lr_scale != 1:
        return None
    if last.held_out_loss <= start.held_out_loss:
        return None
    return (
        f"the loss on held-out samples ended above its first value ({start.held_out_loss:.3g} -> "
        f"{last.held_out_loss:.3g}), and the state of step {best.step} is delivered; take a "
        f"smaller train.lr (now {trainer.recipe.train.lr:g})"
    )


# ---- training


def _divergence(trainer: Trainer) -> str | None:
    remedy = f"take a smaller train.lr (now {trainer.recipe.train.lr:g})"
    if trainer.gave_up:
        return (
            "training diverged twice, the second time at a tenth of the learning rate, and the "
            f"best state, of step {trainer.step}, is delivered; {remedy}"
        )
    if trainer.lr_scale == 1:
        return None
    return f"training diverged once and continued at a tenth of the learning rate; {remedy}"


def _small_batches(trainer: Trainer) -> str | None:
    train = trainer.data.train
    size = round(train.samples / len(train) / distributed.shard().count)  # on this rank
    if not trainer.steps or not trainer.uses_batch_statistics or size > _SMALL_BATCH:
        return None
    return (
        f"BatchNorm trained on the statistics of batches of {size} samples, which are noisy; take "
        "train.batch_norm=held, or a larger data.batch_size"
    )


# ---- parts of the model


def _much_stays_float(trainer: Trainer) -> str | None:
    """Name the largest tensors that stay float if they are most of the file."""
    quantized = trainer.quantized
    constants = quantized.folded_norms().constants
    float_bytes = {
        name: nbytes([value])
        for name, value in quantized.float_tensors().items()
        if name not in constants
    }
    in_float = sum(float_bytes.values())
    total = sum(map(stored_bytes, quantized.tensors)) + sum(kept_bytes(quantized).values())
    if in_float <= _LARGE_FLOAT_SHARE * total:
        return None
    largest = sorted(float_bytes, key=lambda name: float_bytes[name], reverse=True)[:_NAMED]
    reasons = [
        f"{name} ({100 * float_bytes[name] / total:.0f} %: {quantized.kept_float[name]})"
        for name in largest
    ]
    return (
        f"{100 * in_float / total:.0f} % of the file's bytes stay float, which no bit-width "
        f"shrinks; the largest: {', '.join(reasons)}"
    )


@torch.no_grad()
def _constant_tensors(trainer: Trainer) -> str | None:
    """Name the tensors that training made constant."""
    names = [
        tensor.name
        for tensor in trainer.quantized.tensors
        if tensor.parameter.numel() > 1
        and _is_constant(tensor.quantizer(tensor.parameter))
        and not tensor.float_is_constant
    ]
    if not names:
        return None
    return (
        f"every value of {_join(names)} is the same after quantization, so later layers learn "
        "nothing from it; give it more bits by an override (min_bits), or take a smaller "
        f"train.lr (now {trainer.recipe.train.lr:g})"
    )


def _zero_inputs(trainer: Trainer) -> str | None:
    """Name the layers whose input was zero in all calibration samples."""
    inputs = trainer.quantized.activations.items()
    names = [name for name, quantizer in inputs if quantizer.saw_only_zeros]
    if not names:
        return None
    return (
        f"the input of {_join(names)} was zero in all samples that its levels were fitted to, so "
        "any other value is cut off; give training samples where it is not, or keep it in float by "
        "an override (act_bits: 0)"
    )


def _distant_ranges(trainer: Trainer) -> str | None:
    """Name the layers that are called with inputs of very different ranges, which share levels."""
    inputs = trainer.quantized.activations.items()
    names = [
        f"{name} (from {min(r for r in quantizer.ranges if r):.3g} to {max(quantizer.ranges):.3g})"
        for name, quantizer in inputs
        if quantizer.range_ratio >= _DISTANT_RANGES
    ]
    if not names:
        return None
    return (
        f"the inputs of {_join(names)} have ranges {_DISTANT_RANGES:g} times apart or more at the "
        "places that the layer is called from, and one set of levels for all; keep them in float "
        "by an override (act_bits: 0), or bring them to one scale in the network"
    )


@torch.no_grad()
def _unused_levels(trainer: Trainer) -> str | None:
    """Name the tensors with many levels that no value takes.

    At 8 bits the levels are the grid itself and take no bytes.
    """
    names = []
    for tensor in trainer.quantized.tensors:
        bits = tensor.quantizer.bits
        levels = sum(2**s for s in bits)
        if (
            tensor.kind == "bias"
            or max(bits) == 8
            or tensor.parameter.numel() < _VALUES_PER_LEVEL * levels
        ):
            continue
        unused = levels - _used_levels(tensor)
        if unused >= _UNUSED_SHARE * levels:
            names.append(f"{tensor.name} ({unused} of {levels})")
    if not names:
        return None
    return (
        f"levels that no weight takes cost bytes for nothing in {_join(names)}; take a smaller "
        f"train.levels_lr (now {trainer.recipe.train.levels_lr:g}), or give these layers fewer "
        "bits by an override (max_bits)"
    )


def _idle_gates(trainer: Trainer, metrics: list[dict[str, Any]]) -> str | None:
    """Report that under the paper's rule no gate moved before the freeze."""
    gates, recipe = trainer.gates, trainer.recipe
    before_freeze = [
        line["bits"] for line in metrics if "bits" in line and line["step"] <= gates.frozen_from
    ]
    if recipe.gates.rule != "paper" or gates.budget.limit is None or not before_freeze:
        return None
    first = before_freeze[0]
    moved_before_first_report = all(
        first[t.name] < t.max_bits for t in trainer.quantized.tensors if not t.fixed
    )
    if moved_before_first_report or any(bits != first for bits in before_freeze):
        return None
    return (
        f"no gate moved in the {gates.frozen_from} steps before the gates froze, so the budget was "
        f"met by closing gates at once; raise gates.lr (now {recipe.gates.lr:g}), or take "
        "gates.rule=fisher, which needs no tuning"
    )


def _idle_dbps(trainer: Trainer, metrics: list[dict[str, Any]]) -> str | None:
    """Name the tensors whose DBP stayed near its first value until the freeze (SDQ)."""
    sampled = [line for line in metrics if line.get("probabilities")]
    names = [
        name
        for name in (sampled[0]["probabilities"] if sampled else {})
        if len({line["bits"][name] for line in sampled}) == 1
        and _spread([line["probabilities"][name] for line in sampled]) < _IDLE_SPREAD
    ]
    if not names:
        return None
    return (
        f"the DBP of {_join(names)} hardly moved in the {trainer.gates.frozen_from} steps in which "
        "bit-widths were sampled, so chance decided there; take more train.epochs, or a larger "
        f"gates.freeze (now {trainer.recipe.gates.freeze:g})"
    )


def _spread(values: list[float]) -> float:
    return max(values) - min(values)


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.flatten()[0]).all())


def _used_levels(tensor: QuantizedParameter) -> int:
    """Count the distinct values of the quantized tensor, summed over its groups."""
    quantizer = tensor.quantizer
    values, groups = quantizer(tensor.parameter), len(quantizer.bits)
    rows = values if groups == 1 else values.movedim(quantizer.axis, 0)
    return sum(torch.unique(row).numel() for row in rows.reshape(groups, -1))


def _join(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
