"""Running an ONNX file in onnxruntime beside the torch model, to see how far they are from each other."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.data.classification import Score
from ddqcli.errors import VerificationError
from ddqcli.training.evaluate import output_of, sample_differences


@dataclass
class Comparison:
    """onnxruntime beside torch on the same samples."""

    samples: int = 0
    outputs: float = 0.0  # a typical (median) sample's difference, root mean square, as a share of torch's outputs
    accuracy: float | None = None  # percent
    torch_accuracy: float | None = None


def session(path: Path, *, optimised: bool) -> Any:
    """An onnxruntime session on the CPU with torch's number of threads. Raises VerificationError for a damaged file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    )
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if _clips_sums():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes have no other parent
        said = str(error).strip().splitlines()
        raise VerificationError(
            f"onnxruntime cannot load {path}: {said[0] if said else type(error).__name__}"
        ) from error


def _clips_sums() -> bool:
    """Whether this is an x86 CPU without VNNI: there, onnxruntime's fast kernels cut sums of uint8 times int8 to 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux: right is better than fast
        return True


@torch.no_grad()
def compare(
    path: Path,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    metric: Score | None,
    *,
    optimised: bool,
    most: int | None = None,
) -> Comparison:
    """Both on `batches`, up to about `most` samples."""
    run = session(path, optimised=optimised)
    (name,) = [value.name for value in run.get_inputs()]
    found, differences = Comparison(), []
    hits = torch.zeros(2, dtype=torch.float64)
    for x, y in batches:
        theirs = torch.from_numpy(run.run(None, {name: x.contiguous().cpu().numpy()})[0])
        ours = output_of(model(x)).cpu()
        differences.append(sample_differences(theirs, ours))
        found.samples += len(x)
        if metric is not None and y is not None:
            hits += torch.stack(
                [metric(out.to(y.device), y).double().sum().cpu() for out in (theirs, ours)]
            )
        if most is not None and found.samples >= most:
            break
    found.outputs = float(torch.cat(differences).median())
    if metric is not None:
        found.accuracy, found.torch_accuracy = (100 * float(h) / found.samples for h in hits)
    return found
