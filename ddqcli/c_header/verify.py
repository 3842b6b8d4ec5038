"""Read a header back: its arrays bit for bit, and its kernels through the system's compiler."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.decoder import PackedTensor
from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.c_header.header import C_TYPES, is_uniform, symbols_of
from ddqcli.errors import VerificationError
from ddqcli.qat.frozen import FrozenModel
from ddqcli.quant.c_compiler import c_compilers

Array = NDArray[Any]

MAX_COMPILED = 2_000_000  # bytes of constants; a compiler takes some 100 bytes of memory for each
_SECONDS = 300
_ARRAY = re.compile(r"^const (\w+) (\w+)\[\d+\] = \{([^}]*)\};", re.MULTILINE)
_STRUCT = re.compile(r"^const ddq_(?:tensor|input) (\w+) = \{([^}]*)\};", re.MULTILINE)
_PARTS = ("packed", "levels", "bits", "zero_point", "scale")
_DTYPES: dict[str, Any] = {c_type: code for code, c_type in C_TYPES.items() if code != "f2"}
_DTYPES |= {"uint8_t": "u1", "uint16_t": "u2"}


def require_same_header(text: str, frozen: FrozenModel, name: Path) -> None:
    """Decode the arrays of a header with numpy and compare every bit with the trained model.

    Raises VerificationError, which calls the header `name` and names the tensor.
    """
    try:
        arrays = {symbol: _parse(c_type, body) for c_type, symbol, body in _ARRAY.findall(text)}
    except (ValueError, OverflowError, LookupError) as error:  # a number or type that C knows not
        raise VerificationError(f"{name} is damaged: {error}.") from error
    structs = {symbol: body.split(", ") for symbol, body in _STRUCT.findall(text)}
    symbols = symbols_of(frozen)

    def check(tensor: str, same: bool) -> None:
        if not same:
            raise VerificationError(f"{name} differs from what was trained in {tensor}.")

    for t in frozen.quantized:
        symbol = symbols[t.name]
        parts = {part: arrays.get(f"{symbol}_{part}") for part in _PARTS}
        check(t.name, all(part is not None for part in parts.values()))
        axis = t.axis or 0
        rows = t.shape[axis] if t.shape else 1
        wanted = [f"{symbol}_{part}" for part in _PARTS]
        wanted += [str(n) for n in (rows, t.indices.size // max(rows, 1), len(t.levels))]
        check(t.name, structs.get(symbol) == wanted)
        tables = [*(level for level in t.levels if len(level) < 256), np.zeros(0, np.uint8)]
        for part, value in (
            ("levels", np.concatenate(tables)),  # also those that no weight takes
            ("bits", np.array(t.bits, np.uint8)),
        ):
            check(t.name, not value.size or np.array_equal(arrays[f"{symbol}_{part}"], value))
        if t.indices.size:
            check(t.name, _decoded(t, parts) == frozen.trained[t.name].tobytes())
    for table in frozen.activations:
        symbol = symbols[table.name]
        members, levels = structs.get(symbol, []), arrays.get(f"{symbol}_levels")
        check(table.name, len(members) == 4 and members[1] == str(len(table.levels)))
        check(table.name, members[2] == str(table.zero_point))
        check(table.name, _is_number(members[3], table.scale))
        uniform = is_uniform(table) and members[0] == "0"
        check(table.name, uniform or (levels is not None and np.array_equal(levels, table.levels)))
    for tensor, value in frozen.floats.items():
        found = arrays.get(symbols[tensor])
        check(tensor, found is not None and (not value.size or found.tobytes() == value.tobytes()))


def _decoded(t: QuantizedTensor, parts: dict[str, Array | None]) -> bytes:
    """Return the weights that the arrays hold; b"" if they do not fit together."""
    packed = PackedTensor(t.shape, t.axis, **parts)  # type: ignore[arg-type]
    try:
        return decoder.dequantize(packed._replace(bits=packed.bits.astype(int))).tobytes()
    except (ValueError, IndexError):
        return b""


def _is_number(literal: str, value: float) -> bool:
    try:
        return float.fromhex(literal.rstrip("f")) == value
    except (ValueError, OverflowError):
        return False


def _parse(c_type: str, body: str) -> Array:
    literals = body.replace("INT64_MIN", str(np.iinfo(np.int64).min)).split(",")
    values = [literal.strip() for literal in literals if literal.strip()]
    if c_type in ("float", "double"):
        numbers: list[Any] = [float.fromhex(value.removesuffix("f")) for value in values]
    else:
        numbers = [int(value) for value in values]
    return np.array(numbers, _DTYPES[c_type])


def require_same_integers(text: str, frozen: FrozenModel, name: Path) -> tuple[str | None, str]:
    """Compile the header and compare every integer that its kernels unpack with the trained ones.

    Returns the compiler and "", or None and the reason why none could do this. Raises
    VerificationError if an integer differs, or if no compiler takes the header.
    """
    flash = sum(t.nbytes for t in frozen.quantized)
    if flash > MAX_COMPILED:
        reason = f"{flash:,} bytes of constants take a compiler minutes"
        return None, f"the header was not compiled: {reason}"
    tensors = [t for t in frozen.quantized if t.indices.size]
    symbols = symbols_of(frozen)
    most = max((t.indices.size for t in tensors), default=1)
    calls = "".join(f"    show(&{symbols[t.name]});\n" for t in tensors)
    program = (
        '#include "model.h"\n#include <stdio.h>\n'
        f"static int16_t row[{most}];\n"
        "static void show(const ddq_tensor *w)\n{\n"
        "    for (uint32_t k = 0; k < w->rows; k++) {\n"
        "        ddq_unpack(w, k, row);\n"
        "        fwrite(row, sizeof *row, w->columns, stdout);\n    }\n}\n"
        f"int main(void)\n{{\n{calls}    return 0;\n}}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.h").write_text(text, encoding="utf-8")
        (Path(folder) / "main.c").write_text(program, encoding="utf-8")
        cc, output = _compiled_output(Path(folder), name)
    if cc is None:
        return None, f"the header was not compiled: {output.decode()}"
    found = np.frombuffer(output, np.int16)
    for t in tensors:
        mine, found = found[: t.indices.size], found[t.indices.size :]
        if not np.array_equal(mine, _integers(t)):
            raise VerificationError(
                f"{name}, compiled by {cc}, unpacks other integers of {t.name}."
            )
    return cc, ""


def _compiled_output(folder: Path, name: Path) -> tuple[str | None, bytes]:
    """Return the first compiler whose program runs, and what main.c prints; or None and why not.

    Raises VerificationError, which calls the header `name`, if it is refused, and never compiled.
    """
    refused, reason = "", "this machine has no C compiler (cc)"
    for command in c_compilers():
        cc = shlex.join(command)
        try:
            built = subprocess.run(
                [*command, "-std=c99", "-o", "main", "-x", "c", "main.c", "-lm"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            if built.returncode:
                refused = refused or f"{cc} does not compile {name}: {built.stderr[:300]}"
                continue
            done = subprocess.run([folder / "main"], capture_output=True, timeout=_SECONDS)
            return cc, done.stdout
        except subprocess.TimeoutExpired:
            reason = f"{cc} took more than {_SECONDS} seconds"
        except OSError:  # CC compiles for another machine, for one
            reason = f"what {cc} makes does not run on this machine"
    if refused:
        raise VerificationError(refused)
    return None, reason.encode()


def _integers(t: QuantizedTensor) -> Array:
    """Return level - zero_point of each row in turn, int16."""
    groups = zip(t.rows(), t.levels, t.zero_point, strict=True)
    rows = [levels[row].astype(np.int16) - np.int16(zero) for row, levels, zero in groups]
    return np.concatenate(rows)
