"""OpenVINO as a second runtime of ONNX files, with an implementation of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ddqcli.errors import UsageError, VerificationError
from ddqcli.onnx.runtime import Answers


def require_openvino() -> None:
    """Raise UsageError unless the extra `ddqcli[openvino]` is installed."""
    if importlib.util.find_spec("openvino") is None:
        raise UsageError("--openvino needs openvino; run pip install 'ddqcli[openvino]'.")


def openvino_answers(file: Path | bytes, *, exact: bool = True) -> Answers:
    """Return OpenVINO's answers of a file on the CPU, with torch's number of threads.

    Without `exact` it computes floats in fewer bits where that is faster. Raises VerificationError
    if it cannot load the file.
    """
    import openvino

    options: dict[str, object] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if exact:
        # By default it quantizes the inputs of layers that the file has in float.
        options |= {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    raw = file.read_bytes() if isinstance(file, Path) else file
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(raw), "CPU", options)
    except Exception as error:  # OpenVINO's errors have no narrower parent
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        name = file if isinstance(file, Path) else "the file"
        raise VerificationError(f"OpenVINO cannot load {name}: {reason}") from error
    wanted = [port.get_any_name() for port in compiled.inputs]

    def answers(feed: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        results = compiled({name: feed[name] for name in wanted})
        return [results[port].copy() for port in compiled.outputs]

    return answers
