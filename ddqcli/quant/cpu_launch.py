"""The C kernels of `cpu_kernels.c`: compiled once a process, and called with tensors on the CPU.

A compiler takes about a second. Without one, or where its result cannot be loaded, PyTorch's
kernels serve instead.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ddqcli.quant.c_compiler import c_compilers
from ddqcli.quant.grid import GRID_CELLS

_KERNELS = (
    "quantize",
    "straight_through",
    "level_gradients",
    "uniform_quantize",
    "uniform_gradients",
)
_TYPES = (torch.float32, torch.bfloat16)

_BLOCK = 16384  # values that one thread takes at a time, and that share partial sums
_SECONDS = 60
# Division and sums as IEEE 754 has them, so that each processor gives the same bytes.
_EXACT = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_SIZES = [f"-DBLOCK={_BLOCK}", f"-DCELLS={GRID_CELLS}"]
_FLAG_SETS = [["-march=native", "-fopenmp"], ["-fopenmp"], []]  # what not every compiler knows


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they cannot be compiled or loaded."""
    return next(filter(None, map(_compiled_by, c_compilers())), None)


def _compiled_by(compiler: list[str]) -> ctypes.CDLL | None:
    """Return the kernels, compiled with the first flags that give a library which loads."""
    try:
        with tempfile.TemporaryDirectory(prefix="ddq-", ignore_cleanup_errors=True) as folder:
            source = Path(folder) / "kernels.c"
            source.write_bytes((files("ddqcli.quant") / "cpu_kernels.c").read_bytes())
            for number, flags in enumerate(_FLAG_SETS):
                target = Path(folder) / f"{number}.so"  # a name is loaded once a process
                command = [*compiler, *_EXACT, *_SIZES, *flags, "-shared", "-fPIC"]
                # CC may be a C++ compiler.
                command += ["-o", str(target), "-x", "c", str(source), "-lm"]
                done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
                if done.returncode == 0 and (kernels := _loaded(target)):
                    return kernels
    except (OSError, subprocess.TimeoutExpired):
        pass
    return None


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Return the library if it can be loaded and has all kernels."""
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError:
        return None
    return kernels if all(hasattr(kernels, name) for name in _KERNELS) else None


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
    tables = _float32(nearest_value, half_step, zero_cell)
    _call("quantize", x, out, _half(x), starts, len(nearest_value), longest, *tables)
    return out


def straight_through(
    grad: Tensor, x: Tensor, starts: Tensor, longest: int, values: Tensor
) -> Tensor:
    """Return grad where x lies between the outer ones of `values` [G, n], 0 elsewhere."""
    out, (groups, n) = torch.empty_like(grad), values.shape
    _call("straight_through", grad, x, out, _half(x), starts, groups, longest, n, *_float32(values))
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
    tables = _float32(values, nearest_value, bin_, half_step, zero_cell, correction)
    groups, n = values.shape
    grad_x, grad_values = torch.empty_like(grad), grad.new_empty(groups, n, dtype=torch.float32)
    for_gates = torch.empty_like(grad_values) if learned_gates else grad_values.new_empty(0)
    blocks = groups * -(-longest // _BLOCK)
    partial = grad.new_empty(blocks, 2 * n, 3, dtype=torch.float64)
    _call(
        "level_gradients",
        *(grad, x, grad_x, _half(x), starts, groups, longest, n),
        *tables,
        *(_address(partial), grad_values, for_gates if learned_gates else None),
    )
    return grad_x, grad_values.to(values.dtype), for_gates.to(values.dtype)


def uniform_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return x [1, M] rounded to codes low..high times `scale`; NaN where it is not finite."""
    out = torch.empty_like(x)
    _call("uniform_quantize", x, out, _half(x), x.numel(), float(scale), float(low), float(high))
    return out


def uniform_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [1, M] and, as LSQ's, of the scalar `scale`."""
    grad_x, grad_scale = torch.empty_like(grad), grad.new_empty((), dtype=torch.float32)
    size = x.numel()
    partial = grad.new_empty(-(-size // _BLOCK), dtype=torch.float64)
    numbers = float(scale), float(low), float(high)
    _call(
        "uniform_gradients",
        *(grad, x, grad_x, _half(x), size, *numbers, _address(partial), grad_scale),
    )
    return grad_x, grad_scale


def _half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _float32(*tables: Tensor | None) -> list[Tensor | None]:
    """Return the tables as the kernels read them; under another default type they have that."""
    return [None if table is None else table.float().contiguous() for table in tables]


def _address(partial: Tensor) -> ctypes.c_void_p:
    """Return where the partial sums lie, whose type the kernels alone know."""
    return ctypes.c_void_p(partial.data_ptr())


def _call(name: str, *args: Tensor | ctypes.c_void_p | float | int | None) -> None:
    """Call a kernel with its arguments, and PyTorch's number of threads."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_as_c, args), _as_c(torch.get_num_threads()))


def _as_c(value: Tensor | ctypes.c_void_p | float | int | None) -> object:
    """Return an argument for C. Raises TypeError for a tensor that no kernel reads."""
    if isinstance(value, Tensor):
        if value.dtype not in (*_TYPES, torch.int64) or not value.is_cpu:
            raise TypeError(f"The kernels in C do not take {value.dtype} on {value.device}.")
        assert value.is_contiguous()
        return _address(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value
