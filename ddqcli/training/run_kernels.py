"""Kernels that quantize in a run: recorded, since another's sums differ in their last bits."""

from __future__ import annotations

import shlex
from dataclasses import replace

from ddqcli.qat.model import QuantizedModel, quantizers
from ddqcli.quant import cpu_launch
from ddqcli.quant.c_compiler import c_compilers
from ddqcli.quant.operators import installed
from ddqcli.training.run_state import FloatBaseline


def kernels_of(quantized: QuantizedModel) -> str:
    """Return whose kernels quantize a calibrated model: `Triton`, `C` or `PyTorch`."""
    device = _device_type(quantized)
    if device == "cuda" and installed():
        return "Triton"
    compiled = device == "cpu" and _is_long(quantized) and cpu_launch.library() is not None
    return "C" if compiled else "PyTorch"


def with_kernels(baseline: FloatBaseline, quantized: QuantizedModel) -> FloatBaseline:
    """Return the baseline of a run that begins with these kernels."""
    surroundings = {**baseline.surroundings, "kernels": kernels_of(quantized)}
    return replace(baseline, surroundings=surroundings)


def warning_of_kernels(quantized: QuantizedModel) -> str | None:
    """Return a warning with a remedy if a long run on a CPU lacks a C compiler."""
    if _device_type(quantized) != "cpu" or not _is_long(quantized) or cpu_launch.library():
        return None
    tried = ", ".join(map(shlex.join, c_compilers()))
    reason = f"{tried} cannot compile them" if tried else "no C compiler is found"
    return (
        f"the kernels in C do not run here, and training is slower: {reason}; install gcc or "
        "clang, or name a compiler in CC"
    )


def _is_long(quantized: QuantizedModel) -> bool:
    return any(quantizer.use_compiled for quantizer in quantizers(quantized))


def _device_type(quantized: QuantizedModel) -> str:
    return next(quantized.model.parameters()).device.type
