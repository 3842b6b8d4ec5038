"""Runtimes beside torch: run an ONNX file on the same samples and compare the answers."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddqcli.data.batches import Batch, batch_size
from ddqcli.data.classification import Score
from ddqcli.data.distance import sample_differences
from ddqcli.data.trees import call, copied, input_names, tensors, with_tensors
from ddqcli.errors import VerificationError

if TYPE_CHECKING:
    import onnxruntime

# Outputs in order, of inputs by name.
Answers = Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Comparison:
    """A runtime beside torch on the same samples."""

    samples: int
    outputs: float  # median of `sample_differences`: a typical sample's, as a share of the outputs
    accuracy: float | None = None  # metric in its unit; None without targets
    torch_accuracy: float | None = None


def session(
    file: Path | bytes, *, optimized: bool, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session on the CPU with torch's number of threads.

    `profile` begins the name of the file to which it writes the time of each kernel. Raises
    VerificationError if the file cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if _saturates_sums():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(
            str(file) if isinstance(file, Path) else file,
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # onnxruntime's errors have no narrower parent
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        name = file if isinstance(file, Path) else "the file"
        raise VerificationError(f"onnxruntime cannot load {name}: {reason}") from error


def _saturates_sums() -> bool:
    """True on x86 CPUs without VNNI, where fast kernels cut sums of uint8 * int8 to 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: correct is better than fast
        return True


def onnxruntime_answers(file: Path | bytes, *, optimized: bool) -> Answers:
    """Return onnxruntime's answers of a file."""
    runtime = session(file, optimized=optimized)
    wanted = [value.name for value in runtime.get_inputs()]
    return lambda feed: runtime.run(None, {name: feed[name] for name in wanted})


@torch.no_grad()
def compare(
    answers: Answers,
    model: nn.Module,
    batches: Iterable[Batch],
    metric: Score | None,
    *,
    scale: float = 100.0,
    max_samples: int | None = None,
) -> Comparison:
    """Compare with the model on `batches` (inputs, targets), up to about `max_samples`.

    `scale` is the factor from scores of `metric` to values in its unit.
    """
    differences: list[Tensor] = []
    scores = torch.zeros(2, dtype=torch.float64)  # of the runtime and of torch
    samples = count = 0
    for x, y in batches:
        arrays = [value.contiguous().cpu().numpy() for value in tensors(x)]
        feed = dict(zip(input_names(x), arrays, strict=True))
        ours = call(model, copied(x))
        theirs = with_tensors(ours, [torch.from_numpy(result) for result in answers(feed)])
        differences.append(sample_differences(theirs, ours).cpu())
        samples += batch_size((x, y))
        if metric is not None and y is not None:
            values = [metric(outputs, y).double().cpu() for outputs in (theirs, ours)]
            scores += torch.stack([value.sum() for value in values])
            count += len(values[0])
        if max_samples is not None and samples >= max_samples:
            break
    outputs = float(torch.cat(differences).median())
    if metric is None or not count:
        return Comparison(samples, outputs)
    accuracy, torch_accuracy = (scale * score / count for score in scores.tolist())
    return Comparison(samples, outputs, accuracy, torch_accuracy)
