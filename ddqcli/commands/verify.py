"""Whether what was exported computes what was trained: built into its network again, compared in outputs and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.artifact.format import ActivationTable, decode_model
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import Checkpoint, load_checkpoint
from ddqcli.data.load import Data, load_data
from ddqcli.errors import UsageError, VerificationError
from ddqcli.qat.load import fill, to_torch
from ddqcli.runs.run import FINAL, Run
from ddqcli.training.device import place_model, resolve_device
from ddqcli.training.evaluate import OnProgress, evaluate, output_of, sample_differences

# On the machine and with the number of threads of the training, both are 0. Elsewhere sums are rounded in another order;
# a value that lies on the edge between two levels of an input may then take the other one.
SAME_OUTPUTS = {
    False: 1e-3,
    True: 0.05,
}  # of a typical sample, as a share of the outputs; True: with quantized inputs
SAME_ACCURACY = 0.1  # points


@dataclass(frozen=True)
class BehaviorCheck:
    """How the network made of a file answers; None for what could not be compared, and `unchecked` says why."""

    outputs: (
        float | None
    )  # a typical sample's difference from the trained one's, as a share of those; 0.0: bit for bit
    accuracy: float | None  # on the held-out data, percent
    expected: float | None  # what the run's report says of it
    unchecked: tuple[str, ...] = ()


def behaviour(path: Path, run: Run, on_progress: OnProgress | None = None) -> BehaviorCheck:
    """Build the network of the run, fill it from the file, and look at what it computes. Raises VerificationError."""
    accuracy = run.report()["accuracy"]
    expected = accuracy and accuracy["quantized"]
    try:
        tensors, tables = decode_model(path)
        model = rebuilt(run, to_torch(tensors), tables, str(path))
    except UsageError as error:
        return BehaviorCheck(
            None, None, expected, (f"outputs and accuracy were not compared: {error}",)
        )
    unchecked = []
    probe = run.load(FINAL).get("probe")
    outputs = None
    if probe is None:
        unchecked.append("outputs were not compared: the run holds none")
    else:
        outputs = difference(answers(model, probe["input"]), probe["output"])
    measured, reason = attempt(lambda: evaluate(model, held_out(run), on_progress=on_progress))
    unchecked += [f"accuracy was not compared: {reason}"] if reason else []
    return BehaviorCheck(outputs, measured, expected, tuple(unchecked))


def require_same_behavior(found: BehaviorCheck, name: Path, *, quantized_inputs: bool) -> None:
    """Raise VerificationError where a behaviour is not the trained one's."""
    if found.outputs is not None and not found.outputs <= SAME_OUTPUTS[quantized_inputs]:
        raise VerificationError(
            f"The network made of {name} does not answer as the trained one: its outputs differ by {found.outputs:.1%}."
        )
    if found.accuracy is None or found.expected is None:
        return
    if not abs(found.accuracy - found.expected) <= SAME_ACCURACY:
        raise VerificationError(
            f"The network made of {name} reaches {found.accuracy:.2f} %, and {found.expected:.2f} % were reported; "
            "if the held-out data are still the same, it is not what was trained."
        )


def rebuilt(
    run: Run, tensors: dict[str, Tensor], tables: dict[str, ActivationTable], what: str
) -> nn.Module:
    """The network of the run with these tensors, where the run's recipe puts it. Raises UsageError if it cannot be had."""
    recipe = run.recipe()
    if recipe.model.pickle and recipe.model.arch is None:  # its code is nowhere else
        checkpoint = load_checkpoint(Path(recipe.model.checkpoint or ""), pickle=True)
    else:
        checkpoint = Checkpoint(Path(what), "", tensors, "")
    arch = (
        recipe.model.arch
        if checkpoint.module or recipe.model.arch
        else run.report()["source"]["arch"]
    )
    model = build_model(checkpoint, arch, recipe.model.kwargs).model
    fill(model, tensors, tables, what)
    return place_model(model, _device(run)).eval()


def held_out(run: Run) -> Data:
    """The data of the run. Raises UsageError if they are gone."""
    recipe = run.recipe()
    return load_data(recipe.data, seed=recipe.train.seed, device=_device(run))


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """What the work gives, or None and why there is nothing."""
    try:
        return work(), ""
    except (UsageError, OSError) as error:
        return None, str(error)


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Any:
    """The model's output for x, on the CPU."""
    output = output_of(model(x.to(next(model.parameters()).device)))
    return output.cpu() if isinstance(output, Tensor) else output


def difference(found: Any, expected: Tensor) -> float:
    """Of a typical sample, see `sample_differences`: the median, so that single values on an edge do not matter."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return float("inf")
    return float(sample_differences(found, expected).median())


def _device(run: Run) -> torch.device:
    """That of the training, if there is one like it here."""
    device, _ = attempt(lambda: resolve_device(run.recipe().train.device))
    return device or torch.device("cpu")
