"""OpenVINO as a second runtime of ONNX files, with an implementation of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ddqcli.errors import UsageError, VerificationError
from ddqcli.onnx.runtime import Answers


def require_openvino() -> None:
    """Raise UsageError unless the extra `ddqcli[openvino]` is installed."""
    if importlib.util.find_spec("openvino") is None:
        raise UsageError("--openvino needs openvino; run pip install 'ddqcli[openvino]'.")


def openvino_answers(path: Path) -> Answers:
    """Return OpenVINO's answers of a file on the CPU.

    Raises VerificationError if it cannot load the file.
    """
    import openvino

    options = {
        # By default it quantizes the inputs of layers that the file has in float.
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path.read_bytes()), "CPU", options)
    except Exception as error:  # OpenVINO's errors have no narrower parent
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        raise VerificationError(f"OpenVINO cannot load {path}: {reason}") from error
    wanted = [port.get_any_name() for port in compiled.inputs]

    def answers(feed: dict[str, object]) -> list[object]:
        results = compiled({name: feed[name] for name in wanted})
        return [results[port].copy() for port in compiled.outputs]

    return answers  # type: ignore[return-value]
