"""Resume means the same run: the float model must compute what it did when the run began.

Equal weights do not make equal networks: an activation function may have been changed. Other
versions, another device or other code do not end a run, but its last bits may depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ddqcli.data.distance import sample_differences
from ddqcli.data.fingerprint import sha256_of_tensors
from ddqcli.data.load import Data
from ddqcli.data.trees import tensors
from ddqcli.errors import UsageError
from ddqcli.training import distributed
from ddqcli.training.evaluate import probe
from ddqcli.training.run_state import FloatBaseline

_SAME_OUTPUTS = 0.01  # a typical sample's difference on another machine, as a share of the outputs
_CPU_INFO = Path("/proc/cpuinfo")
_DECIDE_BITS = ("torch", "device", "threads")  # of the float model's outputs
_CODE = "code "  # precedes the name of a file


def surroundings(device: torch.device, ddq: str, code: Mapping[str, str]) -> dict[str, str]:
    """Return versions, hardware, threads and processes, and a hash for each file of the code."""
    on_gpu = device.type == "cuda"
    return {
        "ddq": ddq,
        "torch": str(torch.__version__),  # a class of its own
        "device": torch.cuda.get_device_name(device) if on_gpu else _name_of_cpu(),
        "processes": str(distributed.shard().count),
        "threads": str(torch.get_num_threads()),
        **{f"{_CODE}{name}": digest for name, digest in code.items()},
    }


def first_outputs(model: nn.Module, data: Data) -> tuple[str, list[Tensor] | None]:
    """Return a hash of the first evaluation samples, and the model's outputs for them.

    No outputs if the samples differ each time they are read, or are another rank's; or if the
    outputs differ.
    """
    if distributed.shard().count > 1 or not data.val.fingerprint():
        return "", None
    first, second = probe(model, data), probe(model, data)
    if (
        first is None
        or second is None
        or sample_differences(second["output"], first["output"]).any()
    ):
        return "", None
    return sha256_of_tensors(tensors(first["input"])), first["output"]


def check_same_model(
    model: nn.Module, data: Data, baseline: FloatBaseline, here: Mapping[str, str]
) -> str | None:
    """Compare the float model and its surroundings `here` with those that a run was begun with.

    Return None, or what may change the run's last bits. Outputs for samples of the same bits must
    be equal bit for bit on the CPU with the same torch, processor and threads. Raises UsageError.
    """
    inputs, outputs = first_outputs(model, data)
    if outputs is not None and baseline.outputs is not None:
        differences = sample_differences(outputs, baseline.outputs)
        same_place = all(here[name] == baseline.surroundings[name] for name in _DECIDE_BITS)
        on_cpu = next(model.parameters()).device.type == "cpu"
        exact = on_cpu and same_place and inputs == baseline.inputs
        difference = float(differences.max() if exact else differences.median())
        if not difference <= (0 if exact else _SAME_OUTPUTS):
            raise UsageError(
                "The model is not the one that this run was begun with: its outputs differ by "
                f"{100 * difference:.2g}%; go back to its code, or begin a new run."
            )
    return changes(baseline, here)


def changes(baseline: FloatBaseline, here: Mapping[str, str]) -> str | None:
    """Return what differs in the surroundings, or None.

    What only one of them has does not count, such as further modules.
    """
    differences = _differences(baseline.surroundings, here)
    return ", ".join(differences) or None


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        name.removeprefix(_CODE) if name.startswith(_CODE) else f"{name} {now[name]} (then {value})"
        for name, value in then.items()
        if name in now and now[name] != value
    ]


def _name_of_cpu() -> str:
    """Return the processor's name, where the system tells it, and the instructions torch uses."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"
