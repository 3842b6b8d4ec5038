"""Verification of an exported model: its network rebuilt, its outputs and accuracy compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddqcli.artifact.read import decode_model
from ddqcli.artifact.tensors import ActivationTable
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import Checkpoint, load_checkpoint
from ddqcli.checkpoint.torchvision_models import build_torchvision
from ddqcli.data.batches import tree_to_device
from ddqcli.data.distance import sample_differences
from ddqcli.data.load import Data, load_data
from ddqcli.data.trees import Tree
from ddqcli.errors import UsageError, VerificationError
from ddqcli.qat.load import fill, to_torch
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.run import Run
from ddqcli.runs.trust import code_of
from ddqcli.training.device import place_model, resolve_device
from ddqcli.training.evaluate import OnProgress, evaluate, probe_outputs
from ddqcli.training.unlabelled import is_labelled, with_float_targets

T = TypeVar("T")

# Both differences are 0 on the machine of the training and with its number of threads. Elsewhere
# sums are rounded in another order, and a value on the edge between two levels of an input may take
# the other one.
OUTPUT_TOLERANCE = 1e-3  # a typical sample's difference, as a share of the outputs
QUANTIZED_OUTPUT_TOLERANCE = 0.05  # the same with quantized inputs
ACCURACY_TOLERANCE = 0.1  # points, or percent of a metric in another unit


@dataclass(frozen=True)
class BehaviorCheck:
    """Outputs and accuracy of the network rebuilt from a file; None if not compared."""

    outputs: float | None  # a typical sample's difference, as a share of the outputs; 0: same bits
    accuracy: float | None  # the metric on the held-out data, in its unit
    expected: float | None  # the metric in the run's report
    unchecked: tuple[str, ...] = ()  # reasons why something was not compared


def check_behavior(path: Path, run: Run, on_progress: OnProgress | None = None) -> BehaviorCheck:
    """Rebuild the run's network from the file and compare what it computes with the run.

    Raises VerificationError if the file is damaged.
    """
    accuracy = run.report().accuracy
    expected = accuracy.quantized if accuracy else None
    try:
        tensors, tables, _ = decode_model(path)
        probe = run.probe()
        model = rebuild_model(run, to_torch(tensors), tables, str(path), probe)
    except UsageError as error:
        reason = f"outputs and accuracy were not compared: {error}"
        return BehaviorCheck(None, None, expected, (reason,))
    unchecked = []
    outputs = None
    if probe is None:
        unchecked.append("outputs were not compared: the run holds none")
    else:
        outputs = output_difference(model, probe["input"], probe["output"])
    measured, reason = attempt(lambda: evaluate(model, load_held_out(run), on_progress=on_progress))
    if reason:
        unchecked.append(f"accuracy was not compared: {reason}")
    return BehaviorCheck(outputs, measured, expected, tuple(unchecked))


def require_same_behavior(
    check: BehaviorCheck, name: Path, metric: Metric, *, quantized_inputs: bool
) -> None:
    """Raise VerificationError if outputs or metric differ by more than their tolerance."""
    tolerance = QUANTIZED_OUTPUT_TOLERANCE if quantized_inputs else OUTPUT_TOLERANCE
    if check.outputs is not None and not check.outputs <= tolerance:
        raise VerificationError(
            f"The outputs of the network rebuilt from {name} differ from the trained network's by "
            f"{check.outputs:.1%}."
        )
    if check.accuracy is None or check.expected is None:
        return
    tolerance = metric.tolerance(ACCURACY_TOLERANCE, check.expected)
    if not abs(check.accuracy - check.expected) <= tolerance:
        measured, reported = (metric.text(v, " ") for v in (check.accuracy, check.expected))
        raise VerificationError(
            f"The network rebuilt from {name} reaches {measured}, but the run reported "
            f"{reported}; unless the held-out data changed, it is not what was trained."
        )


def rebuild_model(
    run: Run,
    tensors: dict[str, Tensor],
    tables: dict[str, ActivationTable],
    source: str,
    probe: Mapping[str, Any] | None,
) -> nn.Module:
    """Return the run's network with these tensors, in eval mode on the device of its recipe.

    `probe` is that of the run, which says the memory format.

    Raises UsageError, which calls the tensors `source`, if the network cannot be built, or only by
    code that this user neither ran here nor trusts.
    """
    recipe = run.recipe()
    with code_of(run):
        if recipe.model.pickle and recipe.model.arch is None:  # the code is in the pickle alone
            checkpoint = load_checkpoint(Path(recipe.model.checkpoint or ""), pickle=True)
        else:
            checkpoint = Checkpoint(Path(source), "", tensors, "")
        if checkpoint.module or recipe.model.arch:
            source_path = Path(recipe.model.checkpoint or "")
            folder = source_path if source_path.is_dir() else source_path.parent
            built = build_model(checkpoint, recipe.model.arch, recipe.model.kwargs, folder)
        else:  # the report names what was recognized
            arch = run.report().source.arch
            built = build_torchvision(checkpoint, arch, recipe.model.kwargs)
    fill(built.model, tensors, tables, source)
    return place_model(built.model, _device(run), contiguous=_contiguous(probe)).eval()


def load_held_out(run: Run) -> Data:
    """Load the data of the run. Raises UsageError or DataError if they are gone or not trusted.

    Without labels, the float model's outputs are the targets: its checkpoint must still be there.
    """
    recipe = run.recipe()
    train = recipe.train
    with code_of(run):
        data = load_data(
            recipe.data, seed=train.seed, device=_device(run), max_steps=train.max_steps
        )
        return data if is_labelled(data) else with_float_targets(data, _float_model(run))


def _float_model(run: Run) -> nn.Module:
    """Return the float model that the run began with, in eval mode."""
    section = run.recipe().model
    checkpoint = load_checkpoint(Path(section.checkpoint or ""), pickle=section.pickle)
    model = build_model(checkpoint, section.arch, section.kwargs).model
    return place_model(model, _device(run), contiguous=_contiguous(run.probe())).eval()


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result and "", or None and the reason if it cannot be had."""
    try:
        return work(), ""
    except (UsageError, OSError) as error:
        return None, str(error)


@torch.no_grad()
def output_difference(model: nn.Module, inputs: Tree, expected: Tree) -> float:
    """Return the median over samples of `sample_differences`, so that single edges do not count.

    Infinite if the outputs have not the expected shapes.
    """
    device = next(model.parameters()).device
    outputs = probe_outputs(model, tree_to_device(inputs, device))
    outputs = tree_to_device(outputs, torch.device("cpu"))
    return float(sample_differences(outputs, expected).median())


def _contiguous(probe: Mapping[str, Any] | None) -> bool:
    """True if the run's network needs tensors in the usual memory format."""
    return probe is not None and probe["contiguous"] is True


def _device(run: Run) -> torch.device:
    """Return the device of the training if this machine has it, else the CPU."""
    device, _ = attempt(lambda: resolve_device(run.recipe().train.device))
    return device or torch.device("cpu")
