"""A run's torch model beside another runtime: the same samples, and how far answers may differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ddqcli.data.batches import Batch, tree_to_device
from ddqcli.data.load import Data
from ddqcli.data.source import list_names
from ddqcli.data.trees import Tree, shared_length, sliced
from ddqcli.errors import UsageError, VerificationError
from ddqcli.onnx.runtime import Answers, Comparison, compare
from ddqcli.qat.frozen import FrozenModel
from ddqcli.qat.load import to_torch
from ddqcli.runs.evaluation import Metric
from ddqcli.runs.run import Run
from ddqcli.training.evaluate import OnProgress
from ddqcli.training.network_checks import draws_numbers, written_buffers
from ddqcli.training.verify import attempt, load_held_out, rebuild_model

# Runtimes sum in another order, and the shifts of convolutions are rounded to integers (see
# onnx.integer_graph). Now and then a value on the edge between two levels of an input takes the
# other one, and the network goes on from there.
OUTPUT_TOLERANCE = 1e-3  # a typical sample's difference, as a share of the outputs
QUANTIZED_OUTPUT_TOLERANCE = 0.1  # the same with quantized inputs
ACCURACY_TOLERANCE = 0.5  # points, or percent of a metric in another unit, and
_SAMPLE_TOLERANCE = 2  # samples


@dataclass(frozen=True)
class Reference:
    """The torch model of a run, and the samples to compare on."""

    model: nn.Module
    data: Data | None
    example: Tree  # inputs of some samples
    metric: Metric
    quantized_inputs: bool
    unchecked: tuple[str, ...]

    def batches(self, runtime: str, on_progress: OnProgress | None) -> Iterator[Batch]:
        """Yield the held-out data, or else the example without targets."""
        if self.data is None:
            yield tree_to_device(self.example, next(self.model.parameters()).device), None
            return
        for done, batch in enumerate(self.data.val.epoch(0)):
            yield batch
            if on_progress:
                on_progress(runtime, done + 1, len(self.data.val))


def reference_of(run: Run, frozen: FrozenModel, target: str) -> Reference:
    """Rebuild the run's network and load its held-out data, if they are still there.

    Raises UsageError, which names the `target`, without any example input.
    """
    tables = {table.name: table for table in frozen.activations}
    tensors = {name: value for name, value in frozen.expected().items() if name not in tables}
    probe = run.probe()
    model = rebuild_model(run, to_torch(tensors), tables, str(run.path), probe)
    data, reason = attempt(lambda: load_held_out(run))
    if probe:
        example = probe["input"]
    elif data is not None:
        example = sliced(next(iter(data.val.epoch(0)))[0], slice(8))
    else:
        raise UsageError(
            f"{target} export needs an example input, and the run holds none: {reason}"
        )
    unchecked: tuple[str, ...] = ()
    if data is None:
        samples = shared_length(example)
        unchecked = (f"compared on the {samples} samples that the run holds: {reason}",)
    return Reference(model, data, example, run.report().metric, bool(tables), unchecked)


def compare_with(
    reference: Reference,
    answers: Answers,
    runtime: str,
    *,
    name: Path,
    on_progress: OnProgress | None,
    max_samples: int | None = None,
) -> Comparison:
    """Compare a runtime's answers with torch's.

    Raises VerificationError, which calls the file `name`, if they differ.
    """
    comparison = compare(
        answers,
        reference.model,
        reference.batches(runtime.split(",")[0], on_progress),
        reference.data.metric if reference.data else None,
        scale=reference.metric.scale,
        max_samples=max_samples,
    )
    _require_same_answers(comparison, name, reference, runtime)
    return comparison


def _require_same_answers(
    comparison: Comparison, name: Path, reference: Reference, runtime: str
) -> None:
    quantized, metric = reference.quantized_inputs, reference.metric
    tolerance = QUANTIZED_OUTPUT_TOLERANCE if quantized else OUTPUT_TOLERANCE
    if not comparison.outputs <= tolerance:
        raise VerificationError(
            f"{runtime} does not answer as torch does for {name}: outputs differ by "
            f"{comparison.outputs:.1%}{_why_different(reference)}."
        )
    ours, theirs = comparison.torch_accuracy, comparison.accuracy
    if ours is None or theirs is None:
        return
    points = ACCURACY_TOLERANCE + 100 * _SAMPLE_TOLERANCE / comparison.samples
    if abs(theirs - ours) > metric.tolerance(points, ours):
        reached, expected = metric.text(theirs, " "), metric.text(ours, " ")
        raise VerificationError(
            f"{runtime} reaches {reached} with {name}, but torch reaches {expected}."
        )


def _why_different(reference: Reference) -> str:
    """Return a remedy if a forward pass in eval mode does what a graph cannot repeat.

    It may change buffers, or draw random numbers.
    """
    device = next(reference.model.parameters()).device
    inputs = tree_to_device(reference.example, device)
    written = written_buffers(reference.model, inputs)
    if not written and draws_numbers(reference.model, inputs):
        return (
            "; the network's forward draws random numbers, and a runtime draws others: draw "
            "them only if self.training, or take them as an input"
        )
    if not written:
        return ""
    return (
        f"; the network's forward changes {list_names(written)} at every call, and a graph has "
        "only constants: change buffers only if self.training"
    )
