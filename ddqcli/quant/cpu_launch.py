"""The C kernels of `cpu_kernels.c`: compiled once a process, and called with tensors on the CPU.

A compiler takes about a second. Without one, or where its result cannot be loaded, PyTorch's
kernels serve instead.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16)

_BLOCK = 16384  # BLOCK of cpu_kernels.c: values that share partial sums
_SECONDS = 120
# Division and sums as IEEE 754 has them, so that each processor gives the same bytes.
_EXACT = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_TRIED = [["-march=native", "-fopenmp"], ["-fopenmp"], []]  # what not every compiler knows


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they cannot be compiled or loaded."""
    found = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((path for name in found if name and (path := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ddq-", ignore_cleanup_errors=True) as folder:
        source, target = Path(folder) / "kernels.c", Path(folder) / "kernels.so"
        try:
            source.write_bytes((files("ddqcli.quant") / "cpu_kernels.c").read_bytes())
            for flags in _TRIED:
                command = [compiler, *_EXACT, *flags, "-shared", "-fPIC", "-o", str(target)]
                done = subprocess.run(
                    [*command, str(source), "-lm"], capture_output=True, timeout=_SECONDS
                )
                if done.returncode == 0:
                    return ctypes.CDLL(str(target))
        except (OSError, subprocess.TimeoutExpired):
            return None
    return None


def takes(*tensors: Tensor) -> bool:
    """True if the kernels take these tensors, all of one type."""
    dtype = tensors[0].dtype
    return (
        dtype in _TYPES
        and all(x.is_cpu and x.dtype == dtype and x.numel() for x in tensors)
        and library() is not None
    )


def quantize(
    x: Tensor,
    starts: Tensor,
    longest: int,
    nearest_value: Tensor,
    half_step: Tensor,
    zero_cell: Tensor,
) -> Tensor:
    """Return the nearest level of each x, by tables [G, 512]; NaN where it is not finite.

    `starts` [G + 1] says where the groups begin in x; `longest` is the most values of one of them.
    """
    out = torch.empty_like(x)
    tables = nearest_value, half_step, zero_cell
    _call("quantize", x, out, _half(x), starts, len(nearest_value), longest, *tables)
    return out


def straight_through(
    grad: Tensor, x: Tensor, starts: Tensor, longest: int, values: Tensor
) -> Tensor:
    """Return grad where x lies between the outer ones of `values` [G, n], 0 elsewhere."""
    out, (groups, n) = torch.empty_like(grad), values.shape
    _call("straight_through", grad, x, out, _half(x), starts, groups, longest, values, n)
    return out


def level_gradients(
    grad: Tensor,
    x: Tensor,
    starts: Tensor,
    longest: int,
    values: Tensor,
    nearest_value: Tensor,
    bin_: Tensor,
    half_step: Tensor,
    zero_cell: Tensor,
    correction: Tensor | None,
    learned_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of values [G, n], and of values for the gates [G, n].

    The last is empty without learned gates. `correction` is [G]. See `fake_quantize.py` for the
    formulas.
    """
    grad_x, grad_values = torch.empty_like(grad), torch.empty_like(values)
    for_gates = torch.empty_like(values) if learned_gates else values.new_empty(0)
    groups, n = values.shape
    blocks = groups * -(-longest // _BLOCK)
    partial = torch.empty(blocks, 2 * n, 3, dtype=torch.float64)
    _call(
        "level_gradients",
        *(grad, x, grad_x, _half(x), starts, groups, longest, values, n),
        *(nearest_value, bin_, half_step, zero_cell, correction),
        *(partial, grad_values, for_gates if learned_gates else None),
    )
    return grad_x, grad_values, for_gates


def uniform_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return x [1, M] rounded to codes low..high times `scale`; NaN where it is not finite."""
    out = torch.empty_like(x)
    _call("uniform_quantize", x, out, _half(x), x.numel(), float(scale), float(low), float(high))
    return out


def uniform_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [1, M] and, as LSQ's, of the scalar `scale`."""
    grad_x, grad_scale, size = torch.empty_like(grad), torch.empty(()), x.numel()
    partial = torch.empty(-(-size // _BLOCK), dtype=torch.float64)
    numbers = float(scale), float(low), float(high)
    _call(
        "uniform_gradients",
        *(grad, x, grad_x, _half(x), size, *numbers, partial, grad_scale),
    )
    return grad_x, grad_scale


def _half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _call(name: str, *args: Tensor | float | int | None) -> None:
    """Call a kernel with its arguments, and PyTorch's number of threads."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_as_c, args), _as_c(torch.get_num_threads()))


def _as_c(value: Tensor | float | int | None) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value if value is None else ctypes.c_int64(value)
